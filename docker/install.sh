#!/usr/bin/env bash
# Installs KPU and its pinned dependencies into a virtual environment, made first where there is none.
# The Makefile, CI and the image all install through this script.
#
# Usage: bash docker/install.sh VENV [--extras LIST] [--copy]
#   --extras LIST   comma-separated extras of pyproject.toml (default: dev)
#   --copy          install a copy of the packages instead of a link to this checkout
# PYTHON names the interpreter that makes the environment (default: python3).
set -euo pipefail

usage() {
    sed -n '5,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

extras=dev
editable=(--editable)
venv=
while (($#)); do
    case $1 in
        --extras) [[ -n ${2:-} ]] || usage; extras=$2; shift ;;
        --copy) editable=() ;;
        -*) usage ;;
        *) [[ -z $venv ]] || usage; venv=$1 ;;
    esac
    shift
done
[[ -n $venv ]] || usage

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base=${PYTHON:-python3}
if [[ ! -x $venv/bin/python ]]; then
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "install.sh: expected Python 3.11 or newer as $base, found $("$base" --version 2>/dev/null || echo none);" \
            "name another interpreter with PYTHON=..." >&2
        exit 2
    }
    "$base" -m venv --clear "$venv" || {
        echo "install.sh: $base cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2
        exit 2
    }
fi

python=$venv/bin/python
install=("$python" -m pip install --disable-pip-version-check --progress-bar off --constraint "$root/constraints.txt")
# The build backend is installed first, so that it is the pinned one and not the newest at the time.
"${install[@]}" --quiet hatchling
"${install[@]}" --quiet --no-build-isolation ${editable[@]+"${editable[@]}"} "$root[$extras]"
"$python" -m pip check
"$python" "$root/docker/check_install.py"
