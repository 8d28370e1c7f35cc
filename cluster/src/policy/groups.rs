//! Pods that fare alike, drawn together.
//!
//! Two pods of a namespace fare alike if each reaches the same destinations and is reached from the same sources, for the same ports and by
//! the same end's denial. Then they also stand alike to each other, since the comparison takes in what a pod would say to a twin of its own:
//! so one cell for two groups is true for every pair of their pods.

use std::collections::HashMap;

use super::matrix::{Cell, Matrix, Probe, Verdict};

/// A picture of more pods than this is one of groups.
pub const GROUPED_FROM: usize = 41;

/// Pods as they are drawn: in groups, or each alone.
pub struct Groups {
    /// Numbers of pods, ascending; in the order of their first.
    pub groups: Vec<Vec<usize>>,
}

/// What a pod sees and how it is seen.
#[derive(PartialEq, Eq, Hash)]
struct Standing<'m> {
    namespace: &'m str,
    probes: &'m [Probe],
    as_source: Option<Vec<Option<Verdict>>>,
    as_destination: Option<Vec<Option<Verdict>>>,
}

impl Groups {
    /// Each pod alone.
    pub fn single(matrix: &Matrix) -> Self {
        Self { groups: (0..matrix.pods.len()).map(|pod| vec![pod]).collect() }
    }

    /// Pods that fare alike together.
    pub fn alike(matrix: &Matrix) -> Self {
        let verdicts = |source: usize, destination: usize| {
            matrix.answers(source, destination).iter().map(|answer| answer.map(|answer| answer.verdict()))
        };
        let is_source = |pod: usize| matrix.sources.binary_search(&pod).is_ok();
        let is_destination = |pod: usize| matrix.destinations.binary_search(&pod).is_ok();
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut by_standing: HashMap<Standing<'_>, usize> = HashMap::new();
        for (number, pod) in matrix.pods.iter().enumerate() {
            let standing = Standing {
                namespace: pod.namespace(),
                probes: matrix.probes(number),
                as_source: is_source(number)
                    .then(|| matrix.destinations.iter().flat_map(|to| verdicts(number, *to)).collect()),
                as_destination: is_destination(number)
                    .then(|| matrix.sources.iter().flat_map(|from| verdicts(*from, number)).collect()),
            };
            let group = *by_standing.entry(standing).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            groups[group].push(number);
        }
        Self { groups }
    }

    /// Alike together where there are many pods, unless each is wanted.
    pub fn readable(matrix: &Matrix, every_pod: bool) -> Self {
        if every_pod || matrix.pods.len() < GROUPED_FROM { Self::single(matrix) } else { Self::alike(matrix) }
    }

    /// Whether some pods stand together.
    pub fn are_grouped(&self) -> bool {
        self.groups.iter().any(|group| group.len() > 1)
    }

    /// The groups that are sources, and those that are destinations: all pods of a group are, or none.
    pub fn rows_and_columns<'g>(&'g self, matrix: &Matrix) -> [Vec<&'g [usize]>; 2] {
        [&matrix.sources, &matrix.destinations].map(|wanted| {
            let wanted = |group: &&[usize]| wanted.binary_search(&group[0]).is_ok();
            self.groups.iter().map(Vec::as_slice).filter(wanted).collect()
        })
    }
}

/// A pair that stands for all pairs of two groups.
pub fn example(sources: &[usize], destinations: &[usize]) -> (usize, usize) {
    let destination = destinations.iter().find(|destination| **destination != sources[0]);
    (sources[0], *destination.unwrap_or(&destinations[0]))
}

/// The cell of two groups.
pub fn cell(matrix: &Matrix, sources: &[usize], destinations: &[usize]) -> Cell {
    let (source, destination) = example(sources, destinations);
    matrix.cell(source, destination)
}

/// What a group is called within its namespace: its pod, or what their names begin with and how many they are.
pub fn short_name(matrix: &Matrix, group: &[usize]) -> String {
    let first = matrix.pods[group[0]].short_name();
    if group.len() == 1 {
        return first.to_owned();
    }
    let common = group.iter().map(|pod| matrix.pods[*pod].short_name()).fold(first, |common, name| {
        let length = common.char_indices().zip(name.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        &common[..length.unwrap_or(common.len().min(name.len()))]
    });
    match common.rfind(['-', '.']) {
        Some(end) => format!("{}* \u{d7}{}", &common[..=end], group.len()),
        None => format!("{first} +{}", group.len() - 1),
    }
}
