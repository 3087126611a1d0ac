#!/usr/bin/env bash
# The runtime's tests and exported files on aarch64, emulated: tests/aarch64.sh DIR [OPTIONS], DIR
# of the ONNX files, and options of benchmarks/versions.py.
#
# Makes a Debian for arm64 with Python and the runtime's packages under build/aarch64 once. It is
# unpacked but not configured, which would take far longer, and nothing is mounted: qemu looks for a
# file there first. Needs root, debootstrap and qemu-user-static.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
home=$PWD/build/aarch64
root=$home/root
cpu=${CPU:-cortex-a76} # no INT8 matrix instructions, as Orin's Cortex-A78AE; max has all

for command in debootstrap qemu-aarch64-static; do
    if ! command -v $command > /dev/null; then
        echo "error: $command: expected a command, found none; apt-get install debootstrap qemu-user-static" >&2
        exit 2
    fi
done

if [ ! -e "$home/done" ]; then
    rm -rf "$home"
    mkdir -p "$home"
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$root"
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$root"
    done
    $python -m pip install --quiet --no-compile --target "$root/site" --python-version 3.11 \
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        numpy pillow onnxruntime onnx pytest pytest-timeout hypothesis filelock
    touch "$home/done"
fi

# What the CPU is: the host's own description makes onnxruntime 1.32 crash in its import.
mkdir -p "$root/proc" "$root/sys/devices/system/cpu"
echo 0 | tee "$root/sys/devices/system/cpu/possible" > "$root/sys/devices/system/cpu/present"
printf '%s\t: %s\n' processor 0 'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x4 \
    'CPU part' 0xd0b 'CPU revision' 1 Features 'fp asimd fphp asimdhp asimddp' > "$root/proc/cpuinfo"

# An interpreter whose children are emulated too: sys.executable is this script.
cat > "$home/python" << EOF
#!/bin/sh
export PYTHONPATH="\$PYTHONPATH:$root/site" PYTHONHOME=$root/usr
exec qemu-aarch64-static -cpu $cpu -0 "\$0" -L $root $root/usr/bin/python3.11 "\$@"
EOF
chmod +x "$home/python"
exec "$python" benchmarks/versions.py "$@" --python "$home/python" --why "qemu-user, $cpu"
