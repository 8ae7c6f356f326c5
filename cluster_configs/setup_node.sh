#!/usr/bin/env bash
# Sets a node up: the pinned project in ~/env, from what was copied to ~/paris_ray. A repeat changes nothing.
# It loads 7 GB, several minutes of a machine that costs, and of NAT's price by the gigabyte, at each start: an image of your own that has ~/env already
# (run this on one machine, and make the image of its disk) spares both. Run by the set-up commands of the files beside it. Wants Ubuntu 24.04 or another system with Python 3.11 to 3.13.
set -euo pipefail
project="$HOME/paris_ray"

# Ray makes the token file as it was copied; nobody else may read it.
chmod 600 "$HOME/.ray/auth_token"

python=$(for one in python3.12 python3.13 python3.11; do "$one" -c '' 2>/dev/null && echo "$one" && break; done) || {
  echo "No Python of 3.11 to 3.13 here; use an image that has one, such as Ubuntu 24.04" >&2
  exit 1
}
if ! "$HOME/env/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv "$HOME/env" 2>/dev/null || {
    # Machines that have just booted update themselves: wait for them.
    root=$([ "$(id -u)" = 0 ] || echo sudo)
    $root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 update
    $root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install "$python-venv"
    "$python" -m venv --clear "$HOME/env"
  }
fi
# Compiled once: Ray starts a process for each worker, and every one imports torch.
"$HOME/env/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
"$HOME/env/bin/uv" pip install --quiet --compile-bytecode --python "$HOME/env/bin/python" -c "$project/constraints.txt" -e "$project[demo]"

# Shells, and so `ray exec` and `ray attach`, have the environment, too.
line=". $project/node.env"
grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || echo "$line" >>"$HOME/.bashrc"

. "$project/node.env"
