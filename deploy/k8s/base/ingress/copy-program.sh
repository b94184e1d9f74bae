#!/bin/sh
# copy-program.sh DIRECTORY: copies HAProxy with its libraries to DIRECTORY and writes a script
# `haproxy` there that runs it in any image. So the container `ingress` checks a configuration with
# the very program that will read it, and its image needs none.
set -eu
target=$1
program=$(command -v haproxy)
mkdir -p "$target/lib"
cp "$program" "$target/lib/haproxy.program"
# Of each line of ldd, the word that is a path.
for library in $(ldd "$program" | tr -s ' \t' '\n\n' | grep '^/'); do
  cp -L "$library" "$target/lib/"
  case $library in */ld-linux* | */ld-musl*) loader=$target/lib/${library##*/} ;; esac
done
cat >"$target/haproxy" <<END
#!/bin/sh
exec "$loader" --library-path "$target/lib" "$target/lib/haproxy.program" "\$@"
END
chmod 755 "$target/haproxy" "$loader"
"$target/haproxy" -v
