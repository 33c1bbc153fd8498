#!/bin/sh
# Runs a program with a Python that Palimpsest supports: sh tools/python.sh -m tools.setup
# $PYTHON names the interpreter. Without it, the script uses the interpreter that created .venv, or the first of the list
# below that runs. (A pyenv shim of a version that is not installed exists but does not run.) ANY_PYTHON=1 also accepts
# Python 3.9 and 3.10, which can run palimpsest.doctor.
wanted='3.11, 3.12 or 3.13'
hint="Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv python3.12-dev; Fedora: dnf install python3.12 python3.12-devel), or name one: make${GOALS:+ $GOALS} PYTHON=/path/to/python3.12"

version() { # print the version of this interpreter, or nothing if it does not run
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

supported() { # whether Palimpsest supports this version
    case $1 in 3.11.* | 3.12.* | 3.13.*) ;; *) return 1 ;; esac
}

runs_doctor() { # whether ANY_PYTHON is set and this version can run palimpsest.doctor
    case $1 in 3.9.* | 3.1[0-9].*) test -n "$ANY_PYTHON" ;; *) return 1 ;; esac
}

if test -n "$PYTHON"; then
    found=$(version "$PYTHON")
    if supported "$found" || runs_doctor "$found"; then exec "$PYTHON" "$@"; fi
    if test -n "$found"; then
        echo "PYTHON=$PYTHON is Python $found; Palimpsest needs $wanted. $hint" >&2
    else
        echo "PYTHON=$PYTHON does not run or is not a Python; Palimpsest needs $wanted. $hint" >&2
    fi
    exit 3
fi

if test -x .venv/bin/python; then
    base=$(.venv/bin/python -c 'import sys; print(sys._base_executable)' 2>/dev/null)
    if test -n "$base" && supported "$(version "$base")"; then exec "$base" "$@"; fi
fi

tried=
older=
for name in python3.11 python3.12 python3.13 python3 python; do
    found=$(version "$name")
    if supported "$found"; then exec "$name" "$@"; fi
    if runs_doctor "$found"; then older=${older:-$name}; fi
    if test -n "$found"; then tried="$tried${tried:+, }$name is $found"; fi
done
if test -n "$older"; then exec "$older" "$@"; fi
echo "Palimpsest needs Python $wanted and found none${tried:+ ($tried)}. $hint" >&2
exit 3
