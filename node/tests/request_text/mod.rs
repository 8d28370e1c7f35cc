//! What must hold for whatever a client writes to the router's socket.

use serde_json::Value;
use weir_node::control::Request;

/// It may be no request. If it is one, nothing that it says was passed over: a condition that is not understood would make a question about
/// some connections one about all, and a deletion too.
pub fn check(line: &[u8]) {
    let Ok(request) = serde_json::from_slice::<Request>(line) else { return };
    let read = serde_json::to_value(&request).expect("a request can be written");
    let again: Request = serde_json::from_value(read.clone()).expect("and read again");
    assert_eq!(serde_json::to_value(&again).expect("as it was"), read);
    assert_eq!(again.is_long(), request.is_long());
    // What serde reads of a key that is given twice is its business; it refuses that of structs.
    let said: Value = serde_json::from_slice(line).expect("a request is JSON");
    assert!(is_in(&said, &read), "{said} was read as {read}");
}

/// Whether all fields of one are in the other.
fn is_in(said: &Value, read: &Value) -> bool {
    match (said, read) {
        (Value::Object(said), Value::Object(read)) => {
            said.iter().all(|(key, value)| read.get(key).is_some_and(|read| is_in(value, read)))
        }
        // What has nothing to say besides its name may be written either way.
        (Value::Object(said), Value::String(read)) => {
            said.len() == 1 && said.get(read).is_some_and(|value| value.is_null())
        }
        // A network is shown as it is written in full.
        (Value::String(_), Value::String(_)) => true,
        _ => said == read,
    }
}
