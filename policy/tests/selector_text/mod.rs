//! What must hold for the selector parser, whatever the text.

use weir_policy::Selector;

/// It may be no selector; if it is one, what is shown of it is the same one again. The place of an error is in the text.
pub fn check(text: &str) {
    match Selector::parse(text) {
        Ok(selector) => {
            let shown = selector.to_string();
            assert_eq!(Selector::parse(&shown).as_ref(), Ok(&selector), "{text:?}, shown as {shown:?}");
        }
        Err(error) => assert!(text.is_char_boundary(error.offset), "{text:?}: {error:?}"),
    }
}
