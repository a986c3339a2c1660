#!/usr/bin/env bash
# Makes .venv from requirements.lock, or brings it up to date. `make setup` calls it.
#   PYTHON     interpreter to use; without it the first fitting one on the PATH
#   ABE_TORCH  build of PyTorch: auto (CPU, or CUDA where there is an NVIDIA driver), cpu, cu126, ...
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.8
backend=${ABE_TORCH:-auto}
here=$(pwd -P)
python=.venv/bin/python

# Where Python keeps no bytecode, torch would be compiled anew in each process that imports it.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

has_nvidia_driver() {
  [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1
}

# Runs the candidate: a pyenv shim is on the PATH even where no interpreter stands behind it.
fits() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || die "PYTHON=$PYTHON does not run, is not Python 3.11 to 3.13, or lacks venv"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "found no Python 3.11, 3.12 or 3.13 with venv and ensurepip. Install one (on Debian and Ubuntu" \
    "also its python3-venv package), or name one: make setup PYTHON=/path/to/python3.12"
}

# Prints the folder among pip's own find-links that holds this CPU build for this Python, if any.
find_wheel_folder() {
  local tag folder links
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
  for folder in $links; do
    if compgen -G "$folder/torch-$torch+cpu-$tag-*.whl" >/dev/null; then
      echo "$folder"
      return
    fi
  done
}

torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements.lock)
[ -n "$torch" ] || die "requirements.lock does not pin torch"

# A virtual environment knows its directory: one that was moved, or left half made, is made anew.
if [ "$(cat .venv/.setup-* 2>/dev/null)" != "$here" ] || ! "$python" -c '' 2>/dev/null; then
  interpreter=$(find_python)
  rm -rf .venv
  "$interpreter" -m venv .venv
fi

source=(--torch-backend "$backend")
if [ "$backend" = auto ] && ! has_nvidia_driver; then
  folder=$(find_wheel_folder)
  [ -z "$folder" ] || source=(--find-links "$folder")
fi

install_with_uv() {
  "$python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" &&
    "$python" -m uv pip install --python "$python" --exact "${source[@]}" \
      --requirements requirements.lock --editable .
}

# Reads pip's configuration, so this also works behind a mirror that only pip knows of.
install_with_pip() {
  local build=
  if [ "$(uname -s)" = Linux ] && ! has_nvidia_driver; then
    build=+cpu
  fi
  "$python" -m pip install "torch==$torch$build" &&
    "$python" -m pip install --requirement requirements.lock --editable .
}

if ! install_with_uv; then
  [ "$backend" = auto ] || die "could not install PyTorch $torch for ABE_TORCH=$backend, see above"
  echo "setup: uv could not do it; trying pip" >&2
  install_with_pip || die "could not install PyTorch $torch and the packages of requirements.lock," \
    "see above. Is the package index reachable? pip's find-links may name a folder of wheels."
fi

if [ "$backend" = auto ] && ! has_nvidia_driver; then
  ! "$python" -m pip list --format=freeze --disable-pip-version-check |
    grep -E '^(nvidia-|triton=)' >&2 ||
    die "these packages are for CUDA, and there is no NVIDIA driver. Run make clean setup ABE_TORCH=cpu"
fi

rm -f .venv/.setup-*
echo "$here" >".venv/.setup-$backend"
