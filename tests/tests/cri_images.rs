//! Images through the CRI, from a real registry.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::{FilesystemUsage, ImageFsInfoRequest};
use bulkhead_tests::request::shell;
use bulkhead_tests::{Cri, Node, suite};

suite! {
    pulled_by_tag,
    pulled_by_digest,
    pulled_from_a_mirror_under_its_own_name,
    index_gives_the_image_of_this_machine,
    layers_in_zstd_and_of_docker_are_read,
    tags_of_one_image_are_one_image,
    unknown_image_has_no_status,
    images_are_listed_by_name,
    removed_by_id_tag_and_digest,
    removal_may_be_repeated,
    image_in_use_serves_its_containers_when_removed,
    layers_are_merged_as_they_should_be,
    hard_link_to_a_lower_layer_is_followed,
    user_is_told,
    pulls_of_one_image_at_once_all_succeed,
    removals_of_one_image_at_once_all_succeed,
    file_systems_are_told,
}

/// Removes all images, so that each case begins alike.
fn without_images(cri: &Cri) -> Result<()> {
    for image in cri.images(None)? {
        cri.remove_image_named(&image.id)?;
    }
    Ok(())
}

fn pulled_by_tag(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let name = node.registry.name("test/base:1");
    let reference = cri.pull(&name)?;
    let image = cri.image(&name)?.context("no image after the pull")?;
    ensure!(image.repo_tags == [name.clone()], "{image:?}");
    let digest = node.registry.digest("test/base:1")?;
    let repository = node.registry.name("test/base");
    ensure!(
        image.repo_digests == [format!("{repository}@{digest}")],
        "{image:?}"
    );
    ensure!(image.size > 0, "{image:?}");
    ensure!(image.id.starts_with("sha256:"), "{image:?}");
    ensure!(
        reference == image.id,
        "{reference} is not the id {}",
        image.id
    );
    for other in [&image.id, &format!("{repository}@{digest}")] {
        let found = cri.image(other)?.with_context(|| other.clone())?;
        ensure!(found.id == image.id, "{other}: {found:?}");
    }
    // Once more changes nothing.
    ensure!(cri.pull(&name)? == reference, "a second pull");
    Ok(())
}

fn pulled_by_digest(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let digest = node.registry.digest("test/base:1")?;
    let name = format!("{}@{digest}", node.registry.name("test/base"));
    cri.pull(&name)?;
    let image = cri.image(&name)?.context("no image after the pull")?;
    ensure!(image.repo_tags.is_empty(), "{image:?}");
    ensure!(image.repo_digests == [name], "{image:?}");
    Ok(())
}

fn pulled_from_a_mirror_under_its_own_name(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let name = "mirrored.test/test/base:1";
    cri.pull(name)?;
    let image = cri.image(name)?.context("no image after the pull")?;
    ensure!(image.repo_tags == [name], "{image:?}");
    let digest = node.registry.digest("test/base:1")?;
    ensure!(
        image.repo_digests == [format!("mirrored.test/test/base@{digest}")],
        "{image:?}"
    );
    Ok(())
}

fn index_gives_the_image_of_this_machine(node: &Node) -> Result<()> {
    let pod = node.pod("index")?;
    let name = node.image("test/multi:1")?;
    let ended = pod.run_to_end(&shell("which", &name, "echo $ARCHITECTURE"))?;
    ensure!(ended.stdout() == "amd64\n", "{:?}", ended.stdout());
    // It is known by the digest of the index, which is what a user would pin.
    let digest = node.registry.digest("test/multi:1")?;
    let image = node.cri()?.image(&name)?.context("no image")?;
    let wanted = format!("{}@{digest}", node.registry.name("test/multi"));
    ensure!(image.repo_digests.contains(&wanted), "{image:?}");
    Ok(())
}

fn layers_in_zstd_and_of_docker_are_read(node: &Node) -> Result<()> {
    let pod = node.pod("kinds")?;
    for kind in ["zstd", "docker"] {
        let image = node.image(&format!("test/{kind}:1"))?;
        let ended = pod.run_to_end(&shell(
            kind,
            &image,
            "cat /data/kept /data/over /data/third",
        ))?;
        ensure!(
            ended.stdout() == "layer 1\nlayer 2\nlayer 3\n",
            "{kind}: {:?}",
            ended.stdout()
        );
    }
    Ok(())
}

fn tags_of_one_image_are_one_image(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let (one, same) = (node.image("test/base:1")?, node.image("test/base:same")?);
    let images = cri.images(None)?;
    ensure!(images.len() == 1, "{images:?}");
    let mut tags = images.first().context("no image")?.repo_tags.clone();
    tags.sort();
    ensure!(tags == [one, same], "{tags:?}");
    Ok(())
}

fn unknown_image_has_no_status(node: &Node) -> Result<()> {
    let unknown = format!("sha256:{}", "0".repeat(64));
    for name in [node.registry.name("test/none:1"), unknown] {
        ensure!(node.cri()?.image(&name)?.is_none(), "{name}");
    }
    Ok(())
}

fn images_are_listed_by_name(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let (base, config) = (node.image("test/base:1")?, node.image("test/config:1")?);
    ensure!(cri.images(None)?.len() == 2, "{:?}", cri.images(None)?);
    let found = cri.images(Some(&config))?;
    ensure!(
        found.len() == 1
            && found
                .iter()
                .all(|image| image.repo_tags == [config.clone()]),
        "{found:?}"
    );
    let found = cri.images(Some(&base))?;
    ensure!(found.len() == 1, "{found:?}");
    let none = cri.images(Some(&node.registry.name("test/none:1")))?;
    ensure!(none.is_empty(), "{none:?}");
    Ok(())
}

fn removed_by_id_tag_and_digest(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let digest = node.registry.digest("test/base:1")?;
    let by_digest = format!("{}@{digest}", node.registry.name("test/base"));
    let id = cri.pull(&node.registry.name("test/base:1"))?;
    for name in [id, node.registry.name("test/base:same"), by_digest] {
        let tag = node.image("test/base:1")?;
        node.image("test/base:same")?;
        cri.remove_image_named(&name)?;
        ensure!(
            cri.image(&tag)?.is_none(),
            "{tag} is there after the removal of {name}"
        );
        let same = cri.image(&node.registry.name("test/base:same"))?;
        ensure!(same.is_none(), "{same:?} after the removal of {name}");
    }
    Ok(())
}

fn removal_may_be_repeated(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let name = node.image("test/base:1")?;
    for _ in 0..2 {
        cri.remove_image_named(&name)?;
    }
    cri.remove_image_named(&node.registry.name("test/none:1"))?;
    Ok(())
}

fn image_in_use_serves_its_containers_when_removed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("in-use")?;
    let name = node.base()?;
    let id = pod.start(&bulkhead_tests::request::sleeper("user", &name))?;
    cri.remove_image_named(&name)?;
    // The file has not been read before, so no cache answers.
    let line = "sha256sum /data/large | cut -d' ' -f1; cat /data/large.sha256";
    let said = cri.shell(&id, line)?;
    let (computed, recorded) = said.split_once('\n').context("two lines")?;
    ensure!(computed == recorded, "{said}");
    // And it can be had again meanwhile.
    node.base()?;
    Ok(())
}

fn layers_are_merged_as_they_should_be(node: &Node) -> Result<()> {
    let pod = node.pod("layers")?;
    let image = node.base()?;
    let expect = |name: &str, line: &str, wanted: &str| -> Result<()> {
        let ended = pod.run_to_end(&shell(name, &image, line))?;
        let said = ended.stdout();
        ensure!(
            said == wanted,
            "{name}: {said:?}, not {wanted:?}; {:?}",
            ended.stderr()
        );
        Ok(())
    };
    expect(
        "whiteout",
        "ls /data/removed 2>&1 || echo gone",
        "ls: /data/removed: No such file or directory\ngone\n",
    )?;
    expect(
        "replaced",
        "cat /data/over /data/kept",
        "layer 2\nlayer 1\n",
    )?;
    expect("opaque", "ls -A /opaque", "new\n")?;
    expect(
        "hard-link",
        "cat /link/second /link/original",
        "linked\nlinked\n",
    )?;
    expect(
        "same-inode",
        "set -- $(stat -c '%i %h' /link/original /link/second); [ $1 = $3 ] && echo $2",
        "2\n",
    )?;
    expect("file-for-directory", "cat /replaced", "layer 3\n")?;
    expect(
        "symbolic-links",
        "cat /data/absolute /data/relative; readlink /data/absolute",
        "layer 1\nlayer 1\n/data/kept\n",
    )?;
    expect(
        "modes",
        "stat -c '%a %u %g %F' /suid/bash /tmp /root /home/app /data/fifo /data/empty",
        "4755 0 0 regular file\n1777 0 0 directory\n700 0 0 directory\n755 1000 1000 directory\n644 0 0 fifo\n644 0 0 regular empty file\n",
    )?;
    expect(
        "large",
        "[ $(sha256sum /data/large | cut -d' ' -f1) = $(cat /data/large.sha256) ] && wc -c < /data/large",
        "300010\n",
    )?;
    expect("times", "stat -c %Y /data/kept", "1700000000\n")?;
    expect("deep", "cat /data/deep/er/est/file", "deep\n")
}

fn user_is_told(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let config = cri
        .image(&node.image("test/config:1")?)?
        .context("no image")?;
    ensure!(config.username == "app", "{config:?}");
    ensure!(config.uid.is_none(), "{config:?}");
    let base = cri.image(&node.base()?)?.context("no image")?;
    ensure!(base.username.is_empty(), "{base:?}");
    Ok(())
}

fn pulls_of_one_image_at_once_all_succeed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    without_images(cri)?;
    let name = node.registry.name("test/base:1");
    let ids = at_once(4, || cri.pull(&name).map_err(Into::into))?;
    let image = cri.image(&name)?.context("no image after the pulls")?;
    ensure!(ids.iter().all(|id| *id == image.id), "{ids:?}");
    Ok(())
}

fn removals_of_one_image_at_once_all_succeed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let name = node.base()?;
    at_once(4, || cri.remove_image_named(&name).map_err(Into::into))?;
    ensure!(cri.image(&name)?.is_none(), "{name} is still there");
    Ok(())
}

fn file_systems_are_told(node: &Node) -> Result<()> {
    node.base()?;
    let told = || -> Result<FilesystemUsage> {
        let reply = node.cri()?.image_fs_info(ImageFsInfoRequest {})?;
        let images = reply.image_filesystems.into_iter().next();
        images.context("no image file system")
    };
    let mut images = told()?;
    // Figures may be gathered from time to time.
    for _ in 0..60 {
        if images.used_bytes.is_some_and(|used| used.value > 0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(500));
        images = told()?;
    }
    ensure!(images.timestamp > 0, "{images:?}");
    ensure!(
        images.used_bytes.is_some_and(|used| used.value > 0),
        "{images:?}"
    );
    ensure!(
        images.inodes_used.is_some_and(|used| used.value > 0),
        "{images:?}"
    );
    let place = images.fs_id.as_ref().context("no mount point")?;
    ensure!(
        std::path::Path::new(&place.mountpoint).is_dir(),
        "{place:?}"
    );
    Ok(())
}

fn hard_link_to_a_lower_layer_is_followed(node: &Node) -> Result<()> {
    let pod = node.pod("hard-link")?;
    let image = node.image("test/hardlink:1")?;
    let ended = pod.run_to_end(&shell(
        "link",
        &image,
        "cat /link/third; stat -c %h /link/third",
    ))?;
    ensure!(ended.stdout() == "linked\n3\n", "{:?}", ended.stdout());
    Ok(())
}

/// Does the same several times at once and answers all results.
fn at_once<T: Send>(times: usize, work: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..times).map(|_| scope.spawn(&work)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        threads.into_iter().map(join).collect()
    })
}
