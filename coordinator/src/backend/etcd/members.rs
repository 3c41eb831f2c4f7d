//! Looks after the list of members: who was added is used, who was removed is not, without a restart of this process.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::config::{DIAL, normal};
use super::failure::Failure;
use super::pool::{Endpoint, Pool};
use super::wire::{MembersRequest, MembersResponse};
use crate::backend::StoreError;

/// Between two looks at the list of members.
const PERIOD: Duration = Duration::from_secs(10);
/// After the first answer the other endpoints have this long to show that they belong to the same cluster.
const OTHERS: Duration = Duration::from_secs(1);

/// Asks every named endpoint, and returns when one has answered and the others had a chance to.
///
/// # Errors
/// When nobody answers, when they belong to different clusters, or when they do not let us in.
pub(super) async fn meet(pool: &Arc<Pool>) -> Result<(), StoreError> {
    let mut asked = tokio::task::JoinSet::new();
    for endpoint in pool.endpoints() {
        let pool = Arc::clone(pool);
        asked.spawn(async move {
            let met = list(&pool, &endpoint).await;
            (endpoint, met)
        });
    }
    let mut deadline = tokio::time::Instant::now() + 2 * DIAL;
    let mut first: Option<Arc<Endpoint>> = None;
    let mut last = None;
    while let Ok(Some(met)) = tokio::time::timeout_at(deadline, asked.join_next()).await {
        match met {
            Ok((endpoint, Ok(_))) if first.is_none() => {
                deadline = deadline.min(tokio::time::Instant::now() + OTHERS);
                first = Some(endpoint);
            }
            Ok((_, Ok(_))) => {}
            Ok((_, Err(Failure::Final(error)))) => return Err(error),
            Ok((_, Err(Failure::Stranger(what)))) => return Err(StoreError::Refused(what)),
            Ok((endpoint, Err(Failure::NotTaken(what)))) if endpoint.is_foreign() => {
                return Err(StoreError::Misconfigured(what));
            }
            Ok((endpoint, Err(failure @ (Failure::NotTaken(_) | Failure::Lost(_))))) => {
                let error = failure.of_question();
                tracing::warn!(endpoint = endpoint.url, %error, "an endpoint of etcd does not answer");
                last = Some(error);
            }
            Err(_) => {}
        }
    }
    let Some(first) = first else {
        return Err(last.unwrap_or_else(|| {
            let named: Vec<String> = pool.endpoints().iter().map(|endpoint| endpoint.url.clone()).collect();
            let named = named.join(", ");
            StoreError::Unavailable(format!(
                "none of {named} answered; check that etcd runs there and the network"
            ))
        }));
    };
    pool.prefer(&first);
    Ok(())
}

/// Keeps the list of endpoints, and the certificates, up to date.
pub(super) async fn patrol(pool: Arc<Pool>, closed: CancellationToken) {
    let mut pace = tokio::time::interval(PERIOD);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = closed.cancelled() => return,
            () = pool.broken.cancelled() => return,
            _ = pace.tick() => {}
        }
        if let Err(error) = pool.renew_tls() {
            tracing::warn!(%error, "the certificates for the metadata store cannot be read; the old ones stay in use");
        }
        let endpoint = pool.current();
        match list(&pool, &endpoint).await {
            Ok(members) => take_over(&pool, &members).await,
            Err(failure) => {
                if let Failure::Stranger(_) = &failure {
                    endpoint.forget_token().await;
                }
                tracing::debug!(endpoint = endpoint.url, ?failure, "the members of etcd are not known");
                pool.leave(&endpoint);
            }
        }
    }
}

async fn list(pool: &Pool, endpoint: &Arc<Endpoint>) -> Result<MembersResponse, Failure> {
    pool.attempt(endpoint, DIAL, &MembersRequest {}).await
}

/// Uses what a list of members says.
async fn take_over(pool: &Arc<Pool>, members: &MembersResponse) {
    let tls = pool.config.tls.is_some();
    let listed: Vec<String> = members
        .members
        .iter()
        .filter(|member| !member.is_learner)
        .flat_map(|member| member.client_urls.iter())
        .filter_map(|url| normal(url, tls).ok())
        .filter(|url| tls || url.starts_with("http:"))
        .collect();
    let known: Vec<String> = pool.endpoints().iter().map(|endpoint| endpoint.url.clone()).collect();
    let mut found = Vec::new();
    for url in listed.iter().filter(|url| !known.contains(url)) {
        // What a member calls itself may mean something else, or nothing, on this machine.
        let endpoint = Endpoint::new(url.clone(), false);
        match list(pool, &endpoint).await {
            Ok(_) => {
                tracing::info!(endpoint = url, "a member of etcd was found");
                found.push(endpoint);
            }
            Err(failure) => {
                tracing::debug!(
                    endpoint = url,
                    ?failure,
                    "a member of etcd cannot be reached by its own address"
                );
            }
        }
    }
    for gone in pool.endpoints().iter().filter(|endpoint| !endpoint.named && !listed.contains(&endpoint.url))
    {
        tracing::info!(endpoint = gone.url, "a member of etcd was removed");
    }
    pool.set_found(&listed, found);
}
