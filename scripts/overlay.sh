#!/usr/bin/env bash
# Make an environment with the Python code of another version of vLLM on the compiled parts of the CPU build in
# .venv, and all else that is there. For a version without a CPU build: what passes says something of its Python
# code, and nothing of its kernels.
#   scripts/overlay.sh 0.33.0 && .venv-0.33.0/bin/python -m pytest tests/unit/engine
set -euo pipefail
cd "$(dirname "$0")/.."

version=$1
base=${VENV:-.venv}
overlay=.venv-$version

wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
"$base/bin/pip" download --quiet --no-deps --only-binary=:all: --dest "$wheels" "vllm==$version"
"$base/bin/python" -m venv --without-pip "$overlay"
"$base/bin/pip" --python "$overlay/bin/python" install --quiet --no-deps orjson # which 0.33 asks for, 0.32 not
"$overlay/bin/python" - "$base" "$version" "$wheels"/vllm-*.whl <<'PY'
import pathlib, sys, sysconfig, zipfile
base, version, wheel = sys.argv[1:]
here = pathlib.Path(sysconfig.get_path("purelib"))
(there,) = pathlib.Path(base).resolve().glob("lib/python3.*/site-packages")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(here, [name for name in archive.namelist() if not name.endswith(".so")])
for library in (there / "vllm").rglob("*.so"):
    link = here / library.relative_to(there)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(library)
# vLLM takes "cpu" in its version for the platform.
metadata = here / f"vllm-{version}.dist-info" / "METADATA"
metadata.write_text(metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
(here / "base.pth").write_text(f"import site; site.addsitedir({str(there)!r})\n")
PY
sed "1s|.*|#!$PWD/$overlay/bin/python|" "$base/bin/vllm" >"$overlay/bin/vllm"
chmod +x "$overlay/bin/vllm"
