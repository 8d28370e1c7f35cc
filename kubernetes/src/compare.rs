//! What is followed beside what a server lists afresh.
//!
//! A list is asked for in pages and from the server's store (no resource version, so that no cache answers), whatever a watch has told. Objects that are
//! as they are known are let go at once, so that it takes little memory. What changes meanwhile differs too: who asks looks again.

use std::{collections::HashSet, rc::Rc};

use weir_cluster::resources::{ObjectId, live::Live};

use crate::{
    dial::Failure,
    follow::MAX_OBJECTS,
    watch::{Shared, Watched},
};

/// An object that is followed and not listed so, or the other way round.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unlike {
    /// Kind, namespace and name.
    pub object: String,
    /// The resource version that is known; `None`: the object is not.
    pub known: Option<String>,
    /// The resource version that is listed; `None`: the object is not.
    pub listed: Option<String>,
}

fn name(id: &ObjectId) -> String {
    let slash = if id.namespace.is_empty() { "" } else { "/" };
    format!("{}/{}{slash}{}", id.kind, id.namespace, id.name)
}

/// Lists all these kinds and compares.
///
/// # Errors
/// Where one cannot be listed.
pub async fn compare(kinds: Vec<Rc<Watched>>, shared: Rc<Shared>) -> Result<Vec<Unlike>, String> {
    let mut found = Vec::new();
    for watched in kinds {
        let plural = watched.resource.plural;
        let of_kind = of_kind(&watched, &shared).await;
        found.extend(of_kind.map_err(|failure| format!("{plural} cannot be listed: {failure}"))?);
    }
    Ok(found)
}

async fn of_kind(watched: &Watched, shared: &Shared) -> Result<Vec<Unlike>, Failure> {
    let mut listed: HashSet<ObjectId> = HashSet::new();
    let mut found = Vec::new();
    let take = |object: Live| {
        let mut follow = watched.follow.borrow_mut();
        let known = follow.set().get(object.id());
        if !known.is_some_and(|known| known.is_same(&object)) {
            found.push(Unlike {
                object: name(object.id()),
                known: known.map(|known| known.version().to_owned()),
                listed: Some(object.version().to_owned()),
            });
        }
        listed.insert(object.id().clone());
        if listed.len() > MAX_OBJECTS { Err(Failure::Nonsense("too many objects".to_owned())) } else { Ok(()) }
    };
    watched.fetch(shared, take).await?;
    let mut follow = watched.follow.borrow_mut();
    let gone = follow.set().iter().filter(|known| !listed.contains(known.id()));
    found.extend(gone.map(|known| Unlike {
        object: name(known.id()),
        known: Some(known.version().to_owned()),
        listed: None,
    }));
    Ok(found)
}
