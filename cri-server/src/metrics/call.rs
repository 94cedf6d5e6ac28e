//! Every call, measured and named in the log of what happens during it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};
use tracing::Instrument;

use super::Metrics;

/// gRPC's code of a method that does not exist, whose name is the client's invention.
const UNIMPLEMENTED: &str = "12";

/// Measures the calls of a server.
#[derive(Clone)]
pub struct Calls(pub Arc<Metrics>);

impl<S> Layer<S> for Calls {
    type Service = Measured<S>;

    fn layer(&self, service: S) -> Measured<S> {
        Measured {
            service,
            metrics: Arc::clone(&self.0),
        }
    }
}

/// A service whose calls are measured.
#[derive(Clone)]
pub struct Measured<S> {
    service: S,
    metrics: Arc<Metrics>,
}

impl<S, B, R> Service<Request<B>> for Measured<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let begun = Instant::now();
        let path = request.uri().path();
        let method = path.rsplit('/').next().unwrap_or_default().to_owned();
        let span = tracing::info_span!("call", method);
        let metrics = Arc::clone(&self.metrics);
        let answered = self.service.call(request);
        let measured = async move {
            let response = answered.await?;
            // An answer that is an error has its code at its head (gRPC over HTTP/2, Trailers-Only).
            let code = response.headers().get("grpc-status");
            let code = code.and_then(|code| code.to_str().ok()).unwrap_or("0");
            let method = match code {
                UNIMPLEMENTED => "unimplemented",
                _ => &method,
            };
            metrics.answered(method, code, begun.elapsed());
            Ok(response)
        };
        Box::pin(measured.instrument(span))
    }
}
