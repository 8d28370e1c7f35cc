//! Values by number.

use std::ops::{Index, IndexMut};

/// Values by number.
///
/// The number of a value that was removed is given again, but only after [`Slab::recycle`]: until then, whoever still
/// has the number cannot take another value for the one that it meant.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    values: Vec<Option<T>>,
    removed: Vec<u32>,
    vacant: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { values: Vec::new(), removed: Vec::new(), vacant: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        match self.vacant.pop() {
            Some(number) => {
                self.values[number as usize] = Some(value);
                number
            }
            None => {
                self.values.push(Some(value));
                (self.values.len() - 1) as u32
            }
        }
    }

    /// Takes the value out.
    ///
    /// # Panics
    /// Where there is none of this number.
    pub(crate) fn remove(&mut self, number: u32) -> T {
        let value = self.values[number as usize].take().expect("a number in use");
        self.removed.push(number);
        value
    }

    /// Lets the numbers of removed values be given again.
    pub(crate) fn recycle(&mut self) {
        self.vacant.append(&mut self.removed);
    }

    /// The values and their numbers, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.values.iter().zip(0..).filter_map(|(value, number)| Some((number, value.as_ref()?)))
    }

    /// As [`Slab::iter`].
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.values.iter_mut().zip(0..).filter_map(|(value, number)| Some((number, value.as_mut()?)))
    }

    pub(crate) fn get(&self, number: u32) -> Option<&T> {
        self.values.get(number as usize)?.as_ref()
    }

    /// Something of each value, by number; `None` where there is no value.
    pub(crate) fn map_all<U>(&self, of_value: impl Fn(&T) -> U) -> Box<[Option<U>]> {
        self.values.iter().map(|value| value.as_ref().map(&of_value)).collect()
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        self.values[number as usize].as_ref().expect("a number in use")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        self.values[number as usize].as_mut().expect("a number in use")
    }
}
