//! `cargo xtask demo`: a real image as a pod in a virtual machine, on any machine.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::artefacts::{self, Profile, cargo};
use crate::bed::{Job, Outcome};
use crate::ground::{self, Ground};
use crate::{assets, packages, place, process};

/// How long the demo may take in the bed, which emulates its processors.
const BED_LIMIT: Duration = Duration::from_secs(300);

/// Arguments of `cargo xtask demo`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    ground: ground::Choice,
}

/// `cargo xtask demo`.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let programs = artefacts::build(Profile::Development, None)?;
    packages::install("the demo", assets::PACKAGES)?;
    eprintln!("demo: the image, made of Debian packages");
    let images = assets::prepare()?;
    eprintln!("demo: the client");
    process::run(cargo().args(["build", "--package", "bulkhead-tests", "--bin", "demo"]))?;
    let client = place::target().join("debug/demo");

    let environment = [
        ("BULKHEAD_BIN_DIR", &programs),
        ("BULKHEAD_TEST_ASSETS", &images),
    ];
    let environment = environment.map(|(name, path)| (name.to_owned(), path.display().to_string()));
    match arguments.ground.make(&programs)? {
        Ground::Plain => {
            let mut command = Command::new(&client);
            let status = command.envs(environment).status();
            let status = status.with_context(|| client.display().to_string())?;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            Ok(ExitCode::from(code.unwrap_or(1)))
        }
        Ground::Bed => {
            let mut job = Job::new(vec![client.display().to_string()])?;
            job.environment = environment.into();
            job.time_limit = BED_LIMIT;
            match job.run()? {
                Outcome::Exited(status) => Ok(ExitCode::from(status)),
                Outcome::Failed(why) | Outcome::Down(why) => {
                    eprintln!("bed: {why}");
                    Ok(ExitCode::FAILURE)
                }
            }
        }
    }
}
