//! An image made sure of, with bars that show how it comes along.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use bulkhead_cri_api::pulls::v1::{FollowRequest, Step};
use bulkhead_cri_api::v1::{ImageSpec, ImageStatusRequest, PodSandboxConfig, PullImageRequest};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::client::Client;
use super::failure::Failure;

const TICK: Duration = Duration::from_millis(120);

/// Makes sure that the server has `image`, and returns the reference it goes by there. Bars go
/// to a terminal's stderr; elsewhere it is one line.
pub async fn ensure(
    client: &Client,
    image: &str,
    pod: &PodSandboxConfig,
) -> Result<String, Failure> {
    let spec = ImageSpec {
        image: image.to_owned(),
        ..ImageSpec::default()
    };
    let request = ImageStatusRequest {
        image: Some(spec.clone()),
        verbose: false,
    };
    let there = client
        .images
        .clone()
        .image_status(request)
        .await
        .map_err(|status| Failure::call(format!("look up image {image}"), &status))?
        .into_inner();
    if let Some(there) = there.image {
        return Ok(there.id);
    }
    let request = PullImageRequest {
        image: Some(spec),
        auth: None,
        sandbox_config: Some(pod.clone()),
    };
    let bars = Bars::new(image);
    let mut images = client.images.clone();
    let pulled = tokio::select! {
        pulled = images.pull_image(request) => pulled,
        never = show(client, image, &bars) => match never {},
    };
    bars.clear();
    pulled
        .map(|answer| answer.into_inner().image_ref)
        .map_err(|status| Failure::call(format!("pull {image}"), &status))
}

/// Shows steps for as long as it is let. A server that tells none is no failure.
async fn show(client: &Client, image: &str, bars: &Bars) -> std::convert::Infallible {
    let request = FollowRequest {
        image: image.to_owned(),
    };
    if let Ok(answer) = client.pulls.clone().follow(request).await {
        let mut steps = answer.into_inner();
        let mut layers = HashMap::new();
        while let Ok(Some(step)) = steps.message().await {
            bars.show(&step, &mut layers);
        }
    }
    std::future::pending().await
}

struct Bars {
    all: MultiProgress,
    title: ProgressBar,
    image: String,
}

impl Bars {
    fn new(image: &str) -> Self {
        let image: String = image
            .chars()
            .filter(|letter| !letter.is_control())
            .collect();
        let all = MultiProgress::new();
        let title = all.add(ProgressBar::new_spinner());
        title.set_message(format!("Pulling {image}"));
        title.enable_steady_tick(TICK);
        if !std::io::stderr().is_terminal() {
            eprintln!("Pulling {image}");
        }
        Self { all, title, image }
    }

    fn show(&self, step: &Step, layers: &mut HashMap<String, ProgressBar>) {
        for layer in &step.layers {
            let bar = layers.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(layer.bytes));
                bar.set_style(style());
                bar.set_message(short(&layer.digest));
                bar
            });
            bar.set_position(layer.fetched.min(layer.bytes));
        }
        let fetched = step
            .layers
            .iter()
            .filter(|layer| layer.fetched >= layer.bytes)
            .count();
        let words = match step.layers.len() {
            0 => format!("Pulling {}", self.image),
            _ if step.finishing => format!("Pulling {}: making its disk", self.image),
            count if fetched == count => {
                format!(
                    "Pulling {}: {} of {count} layers unpacked",
                    self.image, step.unpacked
                )
            }
            count => format!("Pulling {}: {fetched} of {count} layers", self.image),
        };
        self.title.set_message(words);
    }

    fn clear(&self) {
        self.title.finish_and_clear();
        // A terminal that cannot be cleared keeps the bars; that is all.
        let _ = self.all.clear();
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("  {msg}  {bar:30}  {bytes:>10} of {total_bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn short(digest: &str) -> String {
    let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
    digits
        .chars()
        .take(12)
        .filter(|letter| letter.is_ascii_alphanumeric())
        .collect()
}
