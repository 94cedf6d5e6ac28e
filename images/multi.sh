# multi: an index whose first entry is for another architecture. Read by build.sh.
umoci tag --image "$layout/test:base" multi-amd64
umoci config --image "$layout/test:multi-amd64" --config.env ARCHITECTURE=amd64
umoci tag --image "$layout/test:base" multi-arm64
umoci config --image "$layout/test:multi-arm64" --architecture arm64 \
    --config.env ARCHITECTURE=arm64

# manifest IMAGE ARCHITECTURE: the image's entry in an index. The layout names one image a line
# once its JSON is cut at the entries.
manifest() {
    entry=$(tr '{' '\n' < "$layout/test/index.json" | grep -B1 "\"ref.name\":\"$1\"\|ref.name\":\"$1\"" | head -1)
    digest=$(echo "$entry" | grep -o 'sha256:[0-9a-f]*')
    size=$(echo "$entry" | grep -o '"size":[0-9]*' | cut -d: -f2)
    printf '{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":%s,"platform":{"os":"linux","architecture":"%s"}}' \
        "$digest" "$size" "$2"
}
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s,%s]}' \
    "$(manifest multi-arm64 arm64)" "$(manifest multi-amd64 amd64)" > "$work/index"
digest=$(sha256sum "$work/index" | cut -d' ' -f1)
size=$(stat -c %s "$work/index")
cp "$work/index" "$layout/test/blobs/sha256/$digest"
# The index becomes one more entry of the layout, under the name multi.
sed -i 's|"manifests":\[|&{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:'"$digest"'","size":'"$size"',"annotations":{"org.opencontainers.image.ref.name":"multi"}},|' \
    "$layout/test/index.json"
