# Shell functions shared by the scripts of this folder; sourced, never run.

TORCHLIFT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
TORCHLIFT_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/torchlift"

say() { printf '[%s] %s\n' "$(basename "$0")" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Runs a command; prints what it wrote only if it fails.
quietly() {
  local log
  log="$(mktemp)"
  if ! "$@" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    die "this failed: $*"
  fi
  rm -f "$log"
}

# Writes standard input to $1, and leaves the file alone if it already says just that.
write_if_changed() {
  local fresh
  fresh="$(mktemp "$1.XXXXXX")"
  cat >"$fresh"
  chmod 644 "$fresh"
  if cmp -s "$fresh" "$1"; then rm -f "$fresh"; else mv -f "$fresh" "$1"; fi
}
