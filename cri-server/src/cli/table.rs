//! What `ps` and `images` print.

use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_cri_api::v1::{
    Container, ContainerState, Image, ListContainersRequest, ListImagesRequest,
    ListPodSandboxRequest, PodSandbox, PodSandboxState,
};

use super::client::Client;
use super::failure::Failure;

/// How much of an id is shown.
const ID_LENGTH: usize = 12;

/// The pods with their containers; those that ended only with `all`.
pub async fn pods(client: &Client, all: bool) -> Result<String, Failure> {
    let mut runtime = client.runtime.clone();
    let pods = runtime
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await
        .map_err(|status| Failure::call("list pods", &status))?
        .into_inner()
        .items;
    let containers = runtime
        .list_containers(ListContainersRequest::default())
        .await
        .map_err(|status| Failure::call("list containers", &status))?
        .into_inner()
        .containers;
    Ok(render(&pod_rows(&pods, &containers, all, now())))
}

/// The images.
pub async fn images(client: &Client) -> Result<String, Failure> {
    let images = client
        .images
        .clone()
        .list_images(ListImagesRequest::default())
        .await
        .map_err(|status| Failure::call("list images", &status))?
        .into_inner()
        .images;
    Ok(render(&image_rows(&images)))
}

/// A line's cells.
pub type Row = Vec<String>;

fn pod_rows(pods: &[PodSandbox], containers: &[Container], all: bool, now: i64) -> Vec<Row> {
    let mut rows = vec![head(&["POD", "NAME", "CONTAINER", "IMAGE", "STATE", "AGE"])];
    for pod in pods {
        let ready = pod.state() == PodSandboxState::SandboxReady;
        let name = pod.metadata.as_ref().map_or("", |metadata| &metadata.name);
        let members: Vec<&Container> = containers
            .iter()
            .filter(|container| container.pod_sandbox_id == pod.id)
            .filter(|container| all || container.state() == ContainerState::ContainerRunning)
            .collect();
        if members.is_empty() && (all || ready) {
            let state = if ready { "ready" } else { "not ready" };
            let age = age(now, pod.created_at);
            rows.push(vec![
                short(&pod.id),
                name.into(),
                "-".into(),
                "-".into(),
                state.into(),
                age,
            ]);
        }
        for container in members {
            let image = container.image.as_ref().map_or("", |spec| {
                if spec.user_specified_image.is_empty() {
                    &spec.image
                } else {
                    &spec.user_specified_image
                }
            });
            let own = container.metadata.as_ref().map_or("", |own| &own.name);
            let state = match container.state() {
                ContainerState::ContainerCreated => "created",
                ContainerState::ContainerRunning => "running",
                ContainerState::ContainerExited => "exited",
                ContainerState::ContainerUnknown => "unknown",
            };
            rows.push(vec![
                short(&pod.id),
                format!("{name}/{own}"),
                short(&container.id),
                image.to_owned(),
                state.to_owned(),
                age(now, container.created_at),
            ]);
        }
    }
    rows
}

fn image_rows(images: &[Image]) -> Vec<Row> {
    let mut rows = vec![head(&["IMAGE", "ID", "SIZE"])];
    for image in images {
        let names = if image.repo_tags.is_empty() {
            &image.repo_digests
        } else {
            &image.repo_tags
        };
        let unnamed = ["-".to_owned()];
        let names = if names.is_empty() {
            &unnamed[..]
        } else {
            names
        };
        for name in names {
            let size = indicatif::HumanBytes(image.size).to_string();
            rows.push(vec![name.clone(), short(&image.id), size]);
        }
    }
    rows
}

/// A line of titles.
pub fn head(titles: &[&str]) -> Row {
    titles.iter().map(|title| (*title).to_owned()).collect()
}

/// The start of an id, enough to tell it from others.
pub fn short(id: &str) -> String {
    id.strip_prefix("sha256:")
        .unwrap_or(id)
        .chars()
        .take(ID_LENGTH)
        .collect()
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// How long ago, in the largest whole unit.
fn age(now: i64, then: i64) -> String {
    let seconds = now.saturating_sub(then).max(0) / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Aligns the columns. Names come from users: no control character reaches the terminal.
pub fn render(rows: &[Row]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let clean = |cell: &str| -> String {
        cell.chars()
            .map(|letter| if letter.is_control() { '?' } else { letter })
            .collect()
    };
    let rows: Vec<Row> = rows
        .iter()
        .map(|row| row.iter().map(|cell| clean(cell)).collect())
        .collect();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use bulkhead_cri_api::v1::{ImageSpec, PodSandboxMetadata};

    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn pod(id: &str, state: PodSandboxState) -> PodSandbox {
        let metadata = PodSandboxMetadata {
            name: "web\x1b[2J".into(),
            ..Default::default()
        };
        let mut pod = PodSandbox {
            id: id.into(),
            metadata: Some(metadata),
            ..Default::default()
        };
        pod.set_state(state);
        pod
    }

    #[test]
    fn ended_pods_and_containers_are_shown_only_when_asked_for() {
        let pods = [
            pod("0123456789abcdef", PodSandboxState::SandboxReady),
            pod("b", PodSandboxState::SandboxNotready),
        ];
        let image = ImageSpec {
            image: "busybox:1".into(),
            ..Default::default()
        };
        let mut container = Container {
            id: "c".into(),
            pod_sandbox_id: "0123456789abcdef".into(),
            image: Some(image),
            created_at: SECOND,
            ..Default::default()
        };
        container.set_state(ContainerState::ContainerExited);
        let rows = pod_rows(&pods, &[container.clone()], false, 4 * SECOND);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1][2], "-");
        let rows = pod_rows(&pods, &[container], true, 4 * SECOND);
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[1][2..], ["c", "busybox:1", "exited", "3s"]);
        assert_eq!(rows[1][0], "0123456789ab");
    }

    #[test]
    fn columns_are_aligned_and_control_characters_harmless() {
        let rows = [head(&["A", "B"]), vec!["lo\x1bng".into(), "x".into()]];
        assert_eq!(render(&rows), "A       B\nlo?ng   x\n");
    }

    #[test]
    fn an_image_is_listed_under_each_of_its_names() {
        let image = Image {
            id: "sha256:0123456789abcdef".into(),
            repo_tags: vec!["a:1".into(), "a:2".into()],
            ..Default::default()
        };
        let rows = image_rows(&[image, Image::default()]);
        let names: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(names, ["IMAGE", "a:1", "a:2", "-"]);
        assert_eq!(rows[1][1], "0123456789ab");
    }
}
