//! Keys that a test can look into while a keeper has them.

use std::{
    io,
    sync::{Arc, Mutex},
};

use weir_dataplane::offload::{keeper::Keys, recipe::Key};

#[derive(Debug, Default)]
pub struct SharedKeys<K>(pub Arc<Mutex<K>>);

impl<K> Clone for SharedKeys<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Keys> Keys for SharedKeys<K> {
    fn insert(&mut self, key: &Key, way: u32, serial: u32) -> io::Result<()> {
        self.0.lock().unwrap().insert(key, way, serial)
    }
    fn insert_all(&mut self, keys: &[(Key, u32, u32)]) -> io::Result<()> {
        self.0.lock().unwrap().insert_all(keys)
    }
    fn remove(&mut self, key: &Key, way: u32, serial: u32) {
        self.0.lock().unwrap().remove(key, way, serial);
    }
    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>> {
        self.0.lock().unwrap().all()
    }
}
