//! Network policy compiled to a classifier.
