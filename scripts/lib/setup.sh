# What the scripts need on the machine: sourced by them, from bash with `set -euo pipefail`.
#
#   setup_python       .venv with the locked dependencies and the project itself; sets PYTHON
#   setup_mosquitto    the broker for local processes
#   setup_java         a Java that runs Cassandra, and Maven to fetch it
#   setup_compiler     a C compiler, for the tests that bend a process's clock and names
#   setup_compiled     shadowsvc with its pure rooms compiled, as the image has it; sets COMPILED
#   setup_haproxy      HAProxy, for the tests of the ingress and of monitoring
#   setup_prometheus   Prometheus and promtool, for the tests of rules and dashboards
#   setup_go           Go, for the peers of the benchmark; sets GO
#   setup_loadgen      the load generator of the benchmark, built into out/bench; installs Go for it
#   setup_engine       installs nothing; whether image and compose can be tried, else ENGINE_PROBLEM
#   setup_processes    mosquitto, Java and Cassandra, to run them as processes
#   setup_backing      the same, if no engine or address makes them needless
#
# Rules: nothing is installed that is there; what is installed is said first, on standard error.
# Packages come from apt on Debian and its kin; elsewhere the message names them. No colours.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=$REPOSITORY/.venv/bin/python
GO=go
_APT_UPDATED=

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# need_packages PACKAGE...: installs them with apt.
need_packages() {
  command -v apt-get >/dev/null || die "please install by hand, as there is no apt-get here: $*"
  [[ $(id -u) == 0 ]] || command -v sudo >/dev/null || die "please install as root: apt-get install $*"
  say "installing with apt: $*"
  _apt_update
  _quietly _as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "$@"
}

_apt_update() {
  [[ ! $_APT_UPDATED ]] || return 0
  _quietly _as_root apt-get update
  _APT_UPDATED=1
}

_as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi
}

# _quietly COMMAND...: its output is shown only if it fails, and then this script ends.
_quietly() {
  local log status=0
  log=$(mktemp)
  "$@" </dev/null >"$log" 2>&1 || status=$?
  if ((status)); then
    tail -n 40 "$log" >&2
    rm -f "$log"
    die "failed with $status: $*"
  fi
  rm -f "$log"
}

# Prints the first Python that is new enough, really runs (a version manager's shim may not) and
# can make a virtual environment (Debian's needs a package more for that). A distribution's comes
# first: it is built with profile-guided optimization, one that a version manager built seldom is,
# and the service then takes about a sixth more CPU an update.
_find_python() {
  local candidate candidates=(
    /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 /usr/bin/python3
    python3.13 python3.12 python3.11 python3
  )
  [[ ! ${SHADOWSVC_PYTHON:-} ]] || candidates=("$SHADOWSVC_PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

# Creates or updates .venv. Does nothing when lock, project file and Python are those of last time;
# makes .venv anew when the lock or the wish for a Python changed.
setup_python() {
  local lock=$REPOSITORY/requirements-dev.txt
  local packages=$REPOSITORY/.venv/.stamp-packages project=$REPOSITORY/.venv/.stamp-project
  local packages_wanted project_wanted found fd options=()
  packages_wanted="$(_hash "$lock") ${SHADOWSVC_PYTHON:-}"
  project_wanted="$(_hash "$REPOSITORY/pyproject.toml") $REPOSITORY"

  exec {fd}<"$REPOSITORY" # two scripts started at once would spoil each other's .venv
  flock "$fd"
  # A .venv that was moved, or whose Python was taken away, does not run.
  if [[ $(_read "$packages") != "$packages_wanted" ]] || ! "$PYTHON" -c '' 2>/dev/null; then
    found=$(_find_python) || {
      [[ ! ${SHADOWSVC_PYTHON:-} ]] ||
        die "SHADOWSVC_PYTHON=$SHADOWSVC_PYTHON is not a Python of 3.11 or later that can make a venv"
      need_packages python3 python3-venv
      found=$(_find_python) || die "no Python of 3.11 or later: set SHADOWSVC_PYTHON to one"
    }
    say "setting up .venv with $found"
    rm -rf "$REPOSITORY/.venv"
    "$found" -m venv "$REPOSITORY/.venv"
    _pip --require-hashes -r "$lock"
    printf '%s' "$packages_wanted" >"$packages"
  fi
  if [[ $(_read "$project") != "$project_wanted" ]]; then
    # With the build backend in the lock, nothing unlocked is fetched.
    ! "$PYTHON" -c 'import hatchling, editables' 2>/dev/null || options=(--no-build-isolation)
    _pip --no-deps "${options[@]}" -e "$REPOSITORY"
    printf '%s' "$project_wanted" >"$project"
  fi
  exec {fd}<&-
}

_pip() {
  _quietly "$PYTHON" -m pip --disable-pip-version-check --no-input install "$@"
}

_hash() {
  sha256sum <"$1" | cut -d' ' -f1
}

_read() {
  [[ ! -f $1 ]] || cat "$1"
}

setup_mosquitto() {
  [[ -z $(PATH=$PATH:/usr/local/sbin:/usr/sbin command -v mosquitto) ]] || return 0
  need_packages mosquitto
  _stop_service mosquitto
}

# _java_version PROGRAM: prints its major version, 0 if it does not run.
_java_version() {
  local version
  version=$("$1" -version 2>&1 | sed -nE 's/.* version "([0-9]+).*/\1/p') || true
  printf '%s' "${version:-0}"
}

# The same places and versions as backing/jars.py.
_has_java() {
  local program version
  for program in "${JAVA_HOME:+$JAVA_HOME/bin/java}" java /usr/lib/jvm/*/bin/java; do
    [[ $program ]] && command -v "$program" >/dev/null || continue
    version=$(_java_version "$program")
    if ((version >= 17 && version <= 23)); then return; fi
  done
  return 1
}

setup_java() {
  local packages=() jars=${XDG_CACHE_HOME:-$HOME/.cache}/shadowsvc
  if ! _has_java; then
    _find_package openjdk-17-jre-headless openjdk-21-jre-headless
    packages+=("$FOUND_PACKAGE")
  fi
  # Maven is there to fetch Cassandra once.
  compgen -G "$jars/cassandra-*/cassandra-all-*.jar" >/dev/null || command -v mvn >/dev/null ||
    packages+=(maven)
  ((${#packages[@]} == 0)) || need_packages "${packages[@]}"
}

# _find_package PACKAGE...: sets FOUND_PACKAGE to the first that apt can install, or the first of all.
_find_package() {
  local package
  FOUND_PACKAGE=$1
  if command -v apt-get >/dev/null; then
    _apt_update
    for package; do
      if [[ $(apt-cache policy "$package" 2>/dev/null) == *"Candidate: "[0-9]* ]]; then
        FOUND_PACKAGE=$package
        return
      fi
    done
  fi
}

setup_haproxy() {
  [[ -z $(PATH=$PATH:/usr/local/sbin:/usr/sbin command -v haproxy) ]] || return 0
  need_packages haproxy
  _stop_service haproxy
}

setup_prometheus() {
  ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null || return 0
  need_packages prometheus
  _stop_service prometheus
}

# _stop_service NAME: ends what a package started at the usual port. We did not ask for one.
_stop_service() {
  if [[ -d /run/systemd/system ]]; then
    _as_root systemctl disable --quiet --now "$1.service" || true
  elif [[ -x /etc/init.d/$1 ]]; then
    _as_root "/etc/init.d/$1" stop >/dev/null 2>&1 || true
  fi
}

setup_compiler() {
  command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    need_packages gcc libc6-dev
}

# Makes it anew when a source, the project file or the Python changed; takes a minute.
setup_compiled() {
  local stamp wanted header
  COMPILED=$REPOSITORY/out/compiled
  stamp=$COMPILED/.stamp
  wanted=$(cd "$REPOSITORY" && { find src -name '*.py' -print0 | sort -z | xargs -0 cat
    cat pyproject.toml; "$PYTHON" -VV; } | _hash /dev/stdin)
  [[ $(_read "$stamp") != "$wanted" ]] || return 0
  setup_compiler
  header=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [[ -e $header ]] || need_packages python3-dev
  say "compiling the pure rooms of shadowsvc"
  rm -rf "$COMPILED"
  # From a copy: the compiler puts what it makes beside the sources, where it would be imported.
  mkdir -p "$COMPILED/build"
  cp -r "$REPOSITORY"/{src,pyproject.toml,README.md,LICENSE} "$COMPILED/build"
  (cd "$COMPILED/build" && _quietly env HATCH_BUILD_HOOKS_ENABLE=1 \
    "$PYTHON" -m hatchling build -t wheel -d "$COMPILED/wheel")
  _pip --no-deps --target "$COMPILED" "$COMPILED"/wheel/*.whl
  rm -rf "$COMPILED"/{build,wheel}
  printf '%s' "$wanted" >"$stamp"
}

_has_go() {
  local program version
  for program in go /usr/local/go/bin/go /usr/lib/go-*/bin/go; do
    command -v "$program" >/dev/null || continue
    version=$("$program" env GOVERSION 2>/dev/null) || continue
    if printf '%s\n' go1.24 "$version" | sort --check=quiet --version-sort; then
      GO=$program
      return
    fi
  done
  return 1
}

setup_go() {
  _has_go && return
  _find_package golang-1.25-go golang-1.24-go golang-go
  need_packages "$FOUND_PACKAGE"
  _has_go || die "the benchmark needs Go 1.24 or later: install it and put it in PATH"
}

# Builds it; Go's cache makes that quick when nothing changed.
setup_loadgen() {
  setup_go
  mkdir -p "$REPOSITORY/out/bench"
  say "building the load generator"
  "$GO" -C "$REPOSITORY/bench/loadgen" build -trimpath -o "$REPOSITORY/out/bench/loadgen" .
}

# An engine is the user's to install. Fails, with the reason in ENGINE_PROBLEM, when none answers.
setup_engine() {
  ENGINE_PROBLEM=$(cd "$REPOSITORY" && "$PYTHON" -c \
    'from backing.choice import engine_problem; print(engine_problem() or "")') ||
    ENGINE_PROBLEM="the question for an engine failed"
  [[ $ENGINE_PROBLEM ]] || docker compose version >/dev/null 2>&1 ||
    ENGINE_PROBLEM="an engine answers, but there is no \`docker compose\`"
  [[ ! $ENGINE_PROBLEM ]]
}

# A cluster is the user's to name. Fails, with the reason in KUBERNETES_PROBLEM, when none answers.
# `kubectl` alone is not asked: the context that it has by default may be anybody's.
setup_kubernetes() {
  KUBERNETES_PROBLEM=
  if [[ ! ${KUBECONFIG:-} ]]; then
    KUBERNETES_PROBLEM="KUBECONFIG is not set"
  elif ! command -v kubectl >/dev/null; then
    KUBERNETES_PROBLEM="there is no \`kubectl\`"
  elif ! kubectl --request-timeout=10s get --raw /readyz >/dev/null 2>&1; then
    KUBERNETES_PROBLEM="no API answers at KUBECONFIG=$KUBECONFIG"
  fi
  [[ ! $KUBERNETES_PROBLEM ]]
}

# What `backing` needs; call it after setup_python.
setup_backing() {
  local kind
  kind=$(cd "$REPOSITORY" && "$PYTHON" -m backing --kind)
  if [[ $kind == processes ]]; then setup_processes; fi
  (cd "$REPOSITORY" && "$PYTHON" -m backing --prepare)
}

# The same without asking; call it after setup_python.
setup_processes() {
  setup_mosquitto
  setup_java
  (cd "$REPOSITORY" && SHADOWSVC_BACKING=processes _quietly "$PYTHON" -m backing --prepare)
}
