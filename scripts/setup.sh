# Sourced by the other shell scripts: makes .venv in the repository and installs the package with one extra into it.
# Usage: . scripts/setup.sh EXTRA        (EXTRA: demo or test)
# Does nothing where the same dependencies are installed already.

extra="$1"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "sa_hf needs Python 3.11 or newer, and none is on PATH (set PYTHON=/path/to/python3.11)" >&2
  return 1
}

if [ ! -x .venv/bin/python ]; then
  python="$(find_python)" || exit 1
  echo "setup: creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# The stamp holds what was installed: a change of the dependencies or of the extra installs again.
stamp=.venv/sa_hf-installed
wanted="$extra $(cat pyproject.toml .ci/constraints.txt .ci/triton_of_torch.py | cksum)"
if [ ! -f "$stamp" ] || ! grep -qxF "$wanted" "$stamp"; then
  echo "setup: installing sa_hf[$extra] and its dependencies into .venv (minutes on a new machine)"
  install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt)
  # Torch first: a build for CPUs brings no Triton, and the kernels' tests want the one that the public build requires.
  "${install[@]}" torch
  triton="$([ "$extra" != test ] || .venv/bin/python .ci/triton_of_torch.py)"
  "${install[@]}" --editable ".[$extra]" ${triton:+"$triton"}
  echo "$wanted" >> "$stamp"
  echo "setup: .venv holds $(du -sm .venv | cut -f1) MB, with torch $(.venv/bin/python -c '
from importlib.metadata import version; print(version("torch"))')"
fi
unset extra stamp wanted install triton
