# shellcheck shell=sh
# Sourced by the scripts beside it: sets `root` and `python`, an interpreter that has blockrepl's dependencies.
# The first that fits is taken: $BLOCKREPL_PYTHON, .venv, python3; else .venv is made.

root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

has_dependencies() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import aiofiles, construct, crc32c, msgspec, pyroute2, rich, typer, uvloop' 2>/dev/null
}

find_python() {
    for python in "${BLOCKREPL_PYTHON:-}" "$root/.venv/bin/python" python3; do
        [ -n "$python" ] && has_dependencies "$python" && return
    done
    python=$root/.venv/bin/python
    echo "$(basename "$0"): making $root/.venv" >&2
    python3 -m venv "$root/.venv" || {
        echo "$(basename "$0"): no virtual environment here: apt-get install python3-venv" >&2
        exit 5
    }
    "$python" -m pip install --quiet --editable "$root" >&2
}

# Debian packages for the commands that are missing; without root, or apt-get, only said.
# Arguments: COMMAND=PACKAGE …
want_commands() {
    packages=
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || packages="$packages ${pair#*=}"
    done
    [ -z "$packages" ] && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "$(basename "$0"): installing$packages" >&2
        # shellcheck disable=SC2086
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends $packages; } \
            >/dev/null || echo "$(basename "$0"): could not install$packages: going on without" >&2
    else
        echo "$(basename "$0"): missing, as root: apt-get install$packages" >&2
    fi
}

find_python
