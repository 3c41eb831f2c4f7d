//! What a shard's worker does with a request: bootstrap, post-bootstrap, close (dispatcher §3–§5).

use std::time::Instant;

use dispatcher_manager::{
    Bootstrapped, Closed, Error, Fault, ManagerContext, ManagerHandle, failed_bootstrap,
};
use heartbeatpb::config::DispatcherManagerConfig;
use heartbeatpb::{
    MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerCloseRequest, MaintainerCloseResponse,
    MaintainerPostBootstrapRequest, MaintainerPostBootstrapResponse, NodeId,
};
use messaging::{
    MaintainerManagerTopic, MaintainerTopic, SendError, ToMaintainer, ToMaintainerManager, ToOrchestrator,
};

use crate::queue::Request;
use crate::registry::{Found, Registry};

/// The managers of a node and what they are made of.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) context: ManagerContext,
    pub(crate) registry: Registry,
}

impl Handler {
    /// Handles one request. May take as long as the downstream takes to open.
    pub(crate) async fn handle(&self, request: Request) {
        if !self.registry.is_open() {
            return;
        }
        match request.message {
            ToOrchestrator::Bootstrap(message) => self.on_bootstrap(request.from, message).await,
            ToOrchestrator::PostBootstrap(message) => self.on_post_bootstrap(request.from, message).await,
            ToOrchestrator::Close(message) => self.on_close(request.from, message).await,
        }
    }

    async fn on_bootstrap(&self, from: NodeId, request: MaintainerBootstrapRequest) {
        let gid = request.changefeed.gid;
        if let Found::Manager(manager) = self.registry.find(gid, request.epoch, now()) {
            match manager.bootstrap(from.clone(), request.clone(), false).await {
                Bootstrapped::Answer(response) | Bootstrapped::Failed(response) => {
                    self.answer_bootstrap(&from, response);
                    return;
                }
                Bootstrapped::Silent => return,
                // Its answer would be nobody's: it goes, and the request finds no manager.
                Bootstrapped::Closed => self.registry.remove_ended(gid),
            }
        }
        match self.registry.find(gid, request.epoch, now()) {
            Found::Nothing => self.create(from, request).await,
            Found::Blocked => {
                tracing::debug!(changefeed = %request.changefeed, %from, epoch = ?request.epoch,
                    "dropped a bootstrap of a finished owner");
            }
            // It is ending; the maintainer asks again.
            Found::Manager(_) => {}
        }
    }

    async fn create(&self, from: NodeId, request: MaintainerBootstrapRequest) {
        let config = match DispatcherManagerConfig::from_bytes(&request.config) {
            Ok(config) => config,
            Err(error) => return self.refuse_bootstrap(&from, &request, &Error::Config(error).fault()),
        };
        let gid = request.changefeed.gid;
        let Some(write_path) = self.registry.begin(gid) else { return };
        let context = self.context.clone();
        let manager = match ManagerHandle::create(context, write_path, config, &from, &request).await {
            Ok(manager) => manager,
            Err(error) => {
                self.registry.abandon(gid);
                if !matches!(error, Error::WritePathClosed) && self.registry.is_open() {
                    self.refuse_bootstrap(&from, &request, &error.fault());
                }
                return;
            }
        };
        if !self.registry.insert(gid, &manager) {
            return;
        }
        tracing::info!(changefeed = %request.changefeed, %from, epoch = ?request.epoch, "dispatcher manager created");
        match manager.bootstrap(from.clone(), request, true).await {
            Bootstrapped::Answer(response) => self.answer_bootstrap(&from, response),
            Bootstrapped::Failed(response) => {
                // Half a manager is of no use. It stays known until it has ended, so that the next one does
                // not meet its remains.
                manager.local_fence();
                self.answer_bootstrap(&from, response);
            }
            Bootstrapped::Silent | Bootstrapped::Closed => {}
        }
    }

    async fn on_post_bootstrap(&self, from: NodeId, request: MaintainerPostBootstrapRequest) {
        let Some(manager) = self.registry.manager(request.changefeed.gid) else {
            tracing::debug!(changefeed = %request.changefeed, %from, "no dispatcher manager for a post-bootstrap");
            return;
        };
        if let Some(response) = manager.post_bootstrap(from.clone(), request).await {
            self.answer_post_bootstrap(&from, response);
        }
    }

    async fn on_close(&self, from: NodeId, request: MaintainerCloseRequest) {
        let MaintainerCloseRequest { changefeed, removed, epoch } = request;
        let success = match self.registry.manager(changefeed.gid) {
            None => {
                self.registry.closed(&changefeed, epoch, removed, now());
                true
            }
            Some(manager) => match manager.close(from.clone(), epoch, removed).await {
                Closed::Done => {
                    self.registry.closed(&changefeed, epoch, removed, now());
                    tracing::info!(%changefeed, %from, ?epoch, removed, "dispatcher manager closed");
                    true
                }
                Closed::NotYet => false,
                // A superseded maintainer has nothing to close here, and may stop asking.
                Closed::NotAllowed => true,
            },
        };
        if self.registry.is_open() {
            let response = MaintainerCloseResponse { changefeed, success, epoch };
            let sent =
                self.context.center.send::<MaintainerTopic>(&from, ToMaintainer::CloseResponse(response));
            log_unsent(&from, sent);
        }
    }

    fn refuse_bootstrap(&self, to: &NodeId, request: &MaintainerBootstrapRequest, fault: &Fault) {
        tracing::warn!(changefeed = %request.changefeed, code = fault.code, error = fault.message,
            "a dispatcher manager cannot be created");
        let node = self.context.center.node();
        self.answer_bootstrap(to, failed_bootstrap(&request.changefeed, request.epoch, node, fault));
    }

    /// A fenced node answers nothing.
    fn answer_bootstrap(&self, to: &NodeId, response: MaintainerBootstrapResponse) {
        if self.registry.is_open() {
            let message = ToMaintainerManager::BootstrapResponse(response);
            log_unsent(to, self.context.center.send::<MaintainerManagerTopic>(to, message));
        }
    }

    fn answer_post_bootstrap(&self, to: &NodeId, response: MaintainerPostBootstrapResponse) {
        if self.registry.is_open() {
            let message = ToMaintainerManager::PostBootstrapResponse(response);
            log_unsent(to, self.context.center.send::<MaintainerManagerTopic>(to, message));
        }
    }
}

/// An answer that is lost is given again when the maintainer asks again.
fn log_unsent(to: &NodeId, sent: Result<(), SendError>) {
    if let Err(error) = sent {
        tracing::debug!(%to, %error, "an answer to a maintainer did not leave");
    }
}

/// The clock of the runtime, which tests may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
