#!/usr/bin/env bash
# Everything that needs a GPU, in one go: see gpu_check.py, which needs the standard library alone.
set -euo pipefail
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: expected Python 3.10 or newer as $python; set PYTHON" >&2
    exit 2
fi
exec "$python" "$(dirname "$0")/gpu_check.py" "$@"
