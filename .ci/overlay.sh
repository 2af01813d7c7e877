# Sourced by the scripts beside it: environments of their own that hold a few packages over those of .venv.
# Usage: . .ci/overlay.sh; overlay FOLDER REQUIREMENT...

# Makes the environment FOLDER, under .venv, with these requirements; anew where it holds others.
overlay() { # folder, requirements
  local home="$1" python="$1/bin/python"
  shift
  local wanted="$* $(cksum < .ci/constraints.txt)"
  if [ "$(cat "$home/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$home"
    .venv/bin/python -m venv --without-pip "$home"
    # Behind the environment's own packages: what it has not comes from .venv.
    .venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
      > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
    "$python" -m pip install --quiet "$@"
    echo "$wanted" > "$home/installed"
  fi
}
