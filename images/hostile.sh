# hostile: images that try to lead a runtime astray. Read by build.sh after base.sh.
#
#   links             /etc is a link that climbs, /dev/null one to a file, /proc holds files of its
#                     own; /node/disk and /node/zero are devices, /work/away leads out of the root
#   proc-link, dev-link, sys-link
#                     /proc, /dev or /sys is a link
#   passwd-fifo, passwd-directory, passwd-device, passwd-large
#                     /etc/passwd is no file, or one of 2 MiB
h=$work/hostile

# hostile NAME: makes the image of the base and what lies in $h/NAME.
hostile() {
    tar --numeric-owner --sort=name --mtime=@1700000000 -C "$h/$1" -cf "$h/$1.tar" .
    umoci tag --image "$layout/test:base" "$1"
    umoci raw add-layer --image "$layout/test:$1" "$h/$1.tar"
    hostiles="$hostiles $1"
}
hostiles=

mkdir -p "$h/links/data/etc" "$h/links/dev" "$h/links/proc/self" "$h/links/node" "$h/links/work"
cp "$l/1/etc/passwd" "$l/1/etc/group" "$h/links/data/etc/"
ln -s ../../../../data/etc "$h/links/etc"
echo 'kept' > "$h/links/data/target"
ln -s /data/target "$h/links/dev/null"
echo 'fake' > "$h/links/proc/self/status"
mknod "$h/links/node/disk" b 254 0
mknod "$h/links/node/zero" c 1 5
chmod 666 "$h/links/node/disk" "$h/links/node/zero"
ln -s ../../../.. "$h/links/work/away"
hostile links

for name in proc dev sys; do
    mkdir -p "$h/$name-link"
    ln -s /data "$h/$name-link/$name"
    hostile "$name-link"
done

for name in fifo directory device large; do
    mkdir -p "$h/passwd-$name/etc"
done
mkfifo "$h/passwd-fifo/etc/passwd"
mkdir "$h/passwd-directory/etc/passwd"
mknod "$h/passwd-device/etc/passwd" c 1 5
head -c 2097152 /dev/zero > "$h/passwd-large/etc/passwd"
for name in fifo directory device large; do
    hostile "passwd-$name"
done
