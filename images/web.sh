# web: Debian's lighttpd with its libraries, perl and a page. Read by build.sh.
#
# Packages are unpacked, not configured: nothing of them runs on the build machine.
w=$work/web
mkdir "$w"
mmdebstrap --quiet --variant=extract \
    --dpkgopt=path-exclude='/usr/share/doc/*' \
    --dpkgopt=path-exclude='/usr/share/man/*' \
    --dpkgopt=path-exclude='/usr/share/locale/*' \
    --include=lighttpd,lsb-base,busybox-static,perl-base,base-passwd,netbase,usr-is-merged \
    bookworm "$w/1" >&2
rm -rf "$w/1/dev" "$w/1/var/lib/apt" "$w/1/var/cache/apt"
mkdir -p "$w/1/dev" "$w/1/var/tmp" "$w/1/proc" "$w/1/sys" "$w/1/root" "$w/1/run"
cp "$w/1/usr/share/base-passwd/passwd.master" "$w/1/etc/passwd"
cp "$w/1/usr/share/base-passwd/group.master" "$w/1/etc/group"
for applet in sh ls cat id echo sleep wget hostname uname ip ps env grep mount; do
    [ -e "$w/1/bin/$applet" ] || ln -s busybox "$w/1/bin/$applet"
done
chmod 1777 "$w/1/var/tmp"

mkdir -p "$w/2/var/www/html" "$w/2/etc/lighttpd"
cat > "$w/2/var/www/html/index.html" <<END
<!doctype html>
<title>Bulkhead</title>
<p>Served by lighttpd from a pod.
END
# lighttpd gives its standard output away; its standard error it keeps.
cat > "$w/2/etc/lighttpd/pod.conf" <<END
server.document-root = "/var/www/html"
server.port = 80
server.modules = ("mod_accesslog")
accesslog.filename = "/dev/stderr"
index-file.names = ("index.html")
mimetype.assign = (".html" => "text/html")
END
for layer in 1 2; do
    tar --numeric-owner --sort=name --mtime=@1700000000 -C "$w/$layer" -cf "$w/$layer.tar" .
done
umoci new --image "$layout/test:web"
umoci raw add-layer --image "$layout/test:web" "$w/1.tar"
umoci raw add-layer --image "$layout/test:web" "$w/2.tar"
umoci config --image "$layout/test:web" \
    --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    --config.cmd /usr/sbin/lighttpd --config.cmd -D --config.cmd -f \
    --config.cmd /etc/lighttpd/pod.conf \
    --config.exposedports 80/tcp
