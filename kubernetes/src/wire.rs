//! What an API server sends: lists, events, refusals. Objects in them stay the text that they are.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::dial::Failure;

/// A page of a list.
#[derive(Deserialize)]
pub struct Page<'j> {
    /// Of the list.
    #[serde(default)]
    pub metadata: ListMetadata,
    /// The objects; a list of none may have no list.
    #[serde(borrow, default)]
    pub items: Option<Vec<&'j RawValue>>,
}

/// Of a list's metadata.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListMetadata {
    /// As of which version.
    pub resource_version: Option<String>,
    /// What to ask for the next page with.
    #[serde(rename = "continue")]
    pub go_on: Option<String>,
}

/// What asks for the first page of a list: so many objects.
pub const FIRST_PAGE: &str = "limit=500";

impl ListMetadata {
    /// What asks for the page after this one; `None`: it was the last.
    ///
    /// # Errors
    /// Where the server's token would add to the question.
    pub fn next_page(&self) -> Result<Option<String>, Failure> {
        let Some(token) = self.go_on.as_deref().filter(|token| !token.is_empty()) else { return Ok(None) };
        if !token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=.".contains(&byte)) {
            return Err(Failure::Nonsense("its continue is none".to_owned()));
        }
        Ok(Some(format!("{FIRST_PAGE}&continue={}", token.replace('=', "%3D"))))
    }
}

/// An event of a watch.
#[derive(Deserialize)]
pub struct Event<'j> {
    /// ADDED, MODIFIED, DELETED, BOOKMARK, ERROR.
    #[serde(rename = "type")]
    pub kind: &'j str,
    /// What it is about.
    #[serde(borrow)]
    pub object: &'j RawValue,
}

/// The object of a bookmark.
#[derive(Deserialize)]
pub struct Bookmark {
    metadata: BookmarkMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct BookmarkMetadata {
    resource_version: String,
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

impl Bookmark {
    /// Up to which version everything was told.
    pub fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    /// Whether it says that the objects at the beginning are all.
    pub fn ends_list(&self) -> bool {
        let annotations = self.metadata.annotations.as_ref();
        annotations.and_then(|all| all.get("k8s.io/initial-events-end")).is_some_and(|value| value == "true")
    }
}

/// Why a server refuses.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// As HTTP has it.
    pub code: u16,
    /// In a word.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

/// The groups that are served.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Groups {
    /// All.
    pub groups: Vec<Group>,
}

/// A group.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its versions.
    pub versions: Vec<Version>,
}

/// A version of a group.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Version {
    /// Its name.
    pub version: String,
}

/// The resources of a group's version.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// All.
    pub resources: Vec<Served>,
}

/// A resource that is served.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Served {
    /// Its name in paths.
    pub name: String,
    /// Its kind.
    pub kind: String,
}
