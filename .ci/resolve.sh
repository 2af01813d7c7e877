#!/usr/bin/env bash
# Shows that the README's install has a solution from the plain index, for every Python that we support,
# by dry runs. Settings and wheels of this machine are left out; a failure of the network is tried again.
# Usage: bash .ci/resolve.sh [PYTHON]        (PYTHON: an environment with pip, .venv/bin/python unless given)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-.venv/bin/python}"
for name in $(compgen -e | grep -E '^(PIP|UV)_' | grep -v _CERT); do unset "$name"; done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Runs a command up to twice. No solution is no failure of the network: the second run then says the same.
twice() {
  "$@" || { echo "resolve: once more: $1 ..." >&2; "$@"; }
}

field() { # name, file of requirements: its version
  sed -n "s/^$1==\\([^ ;]*\\).*/\\1/p" "$2"
}

# uv takes seconds for a Python where pip takes more than a minute, and the pip that a Python brings may be slower yet.
# Sources are allowed, as pip allows them: lm-eval needs sqlitedict, of which the registry has no wheel.
twice "$python" -m pip --isolated install --quiet --disable-pip-version-check --target "$work/tools" 'pip>=25' uv
for release in 3.11 3.12 3.13; do
  twice "$work/tools/bin/uv" pip compile --no-config --quiet \
    --python-version "$release" --python-platform x86_64-manylinux_2_28 --extra test --extra stacks -c .ci/constraints.txt \
    --output-file "$work/$release" pyproject.toml > /dev/null
  torch="$(field torch "$work/$release")" triton="$(field triton "$work/$release")"
  echo "resolve: Python $release: torch $torch, triton $triton, transformers $(field transformers "$work/$release")"
  told="$("$python" .ci/triton_of_torch.py "$torch")"
  if [ "$told" != "$triton" ]; then
    echo "resolve: the public torch $torch requires triton $triton, and .ci/triton_of_torch.py says '$told'" >&2
    exit 1
  fi
done

# pip itself, as on an ordinary machine, for the Python that runs here.
PYTHONPATH="$work/tools" twice "$python" -m pip --isolated install --quiet --disable-pip-version-check \
  --dry-run --ignore-installed -c .ci/constraints.txt '.[test]'
echo "resolve: pip finds a solution for $("$python" --version)"
