# base: a shell, users and some awkward files, in three layers. Read by build.sh.
#
# Layer 1 has files which the others hide, replace, hard-link and make opaque:
#   /data/removed     hidden by layer 2's whiteout
#   /data/over        replaced by layer 2
#   /opaque/old       hidden by layer 2's opaque marker
#   /link/original    replaced by layer 2, with /link/second linked to it
#   /replaced/        a directory in layer 1, a file in layer 3
#   /suid/bash          setuid root
#   /caps/cat         with the file capability CAP_CHOWN
l=$work/base
mkdir -p "$l/1" "$l/2" "$l/3"

(
    cd "$l/1"
    umask 022
    mkdir -p bin etc data opaque/sub link replaced suid caps tmp proc sys dev root home/app www
    cp /bin/busybox bin/busybox
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "bin/$applet"
    done
    cat > etc/passwd <<END
root:x:0:0:root:/root:/bin/sh
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
END
    cat > etc/group <<END
root:x:0:
staff:x:50:app
video:x:44:app,nobody
app:x:1000:
nobody:x:65534:
END
    chown 1000:1000 home/app
    chmod 1777 tmp
    chmod 700 root
    echo 'layer 1' > data/removed
    echo 'layer 1' > data/over
    echo 'layer 1' > data/kept
    echo 'layer 1' > opaque/old
    echo 'layer 1' > opaque/sub/old
    echo 'linked' > link/original
    echo 'layer 1' > replaced/file
    ln -s /data/kept data/absolute
    ln -s ../data/kept data/relative
    : > data/empty
    mkfifo data/fifo
    # Larger than a page, with a hole's worth of zeroes: contents are compared by checksum.
    { echo begin; head -c 300000 /dev/zero; echo end; } > data/large
    sha256sum data/large | cut -d' ' -f1 > data/large.sha256
    echo 'hello from the base image' > www/index.html
    # busybox gives up what setuid gives it; bash -p does not.
    cp /bin/bash-static suid/bash
    chmod 4755 suid/bash
    cp /bin/busybox caps/cat
    setcap cap_chown=ep caps/cat
    mkdir -p data/deep/er/est
    echo deep > data/deep/er/est/file
)
(
    cd "$l/2"
    umask 022
    mkdir -p data opaque link
    : > data/.wh.removed
    echo 'layer 2' > data/over
    : > opaque/.wh..wh..opq
    echo 'layer 2' > opaque/new
    echo 'linked' > link/original
    ln link/original link/second
)
(
    cd "$l/3"
    umask 022
    echo 'layer 3' > replaced
    mkdir -p data
    echo 'layer 3' > data/third
)

# Owners are those of the files, names would be the build machine's.
archive() {
    tar --numeric-owner --sort=name --mtime=@1700000000 --xattrs --xattrs-include='*' \
        -C "$l/$1" -cf "$l/$1.tar" .
}
archive 1
archive 2
archive 3
umoci new --image "$layout/test:base"
for layer in 1 2 3; do
    umoci raw add-layer --image "$layout/test:base" "$l/$layer.tar"
done
umoci config --image "$layout/test:base" \
    --config.cmd /bin/sh \
    --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# config: the same files, with everything an image's configuration can say.
umoci tag --image "$layout/test:base" config
umoci config --image "$layout/test:config" \
    --config.user app:staff \
    --config.workingdir /work/made \
    --config.entrypoint /bin/echo --config.entrypoint entrypoint \
    --config.cmd cmd \
    --config.env FROM_IMAGE=image --config.env BOTH=image \
    --config.stopsignal SIGUSR1 \
    --config.label purpose=tests

# hardlink: a link whose target is in the layer below only, which the OCI specification allows and
# builders avoid.
mkdir -p "$l/4/link"
echo 'linked' > "$l/4/link/original"
ln "$l/4/link/original" "$l/4/link/third"
archive 4
tar --delete -f "$l/4.tar" ./link/original
umoci tag --image "$layout/test:base" hardlink
umoci raw add-layer --image "$layout/test:hardlink" "$l/4.tar"

# pause: what the reference runtime starts in each pod to hold its namespaces.
umoci tag --image "$layout/test:base" pause
umoci config --image "$layout/test:pause" --clear=config.cmd \
    --config.cmd sleep --config.cmd infinity
