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
    for release in "" ==1.23.2; do # the newest, and the newest on JetPack 6
        $python -m pip install --quiet --no-compile --target "$root/site$release" \
            --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_aarch64 \
            --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
            --platform manylinux2014_aarch64 \
            "onnxruntime$release" numpy pillow onnx pytest pytest-timeout hypothesis filelock
    done
    touch "$home/done"
fi

# What the CPU is: the host's own description makes onnxruntime 1.32 crash in its import.
mkdir -p "$root/proc" "$root/sys/devices/system/cpu"
echo 0 | tee "$root/sys/devices/system/cpu/possible" > "$root/sys/devices/system/cpu/present"
printf '%s\t: %s\n' processor 0 'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x4 \
    'CPU part' 0xd0b 'CPU revision' 1 Features 'fp asimd fphp asimdhp asimddp' > "$root/proc/cpuinfo"

# interpreter NAME CPU SITE: one whose children are emulated too, since it is their sys.executable.
interpreter() {
    cat > "$home/$1" << EOF
#!/bin/sh
export PYTHONPATH="\$PYTHONPATH:$root/$3" PYTHONHOME=$root/usr
exec qemu-aarch64-static -cpu $2 -0 "\$0" -L $root $root/usr/bin/python3.11 "\$@"
EOF
    chmod +x "$home/$1"
}

# Cortex-A76 has what counts here of Orin's Cortex-A78AE: FP16, dot products, and no INT8 or BF16
# matrix products, which "max" has, as Thor.
interpreter cortex-a76 cortex-a76 site
interpreter all-instructions max site
interpreter cortex-a76-jetpack-6 cortex-a76 site==1.23.2
exec "$python" benchmarks/versions.py "$@" \
    --python "$home/cortex-a76" "$home/all-instructions" "$home/cortex-a76-jetpack-6"
