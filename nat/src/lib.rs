//! Services compiled to a lookup table: backend selection, masquerade decision, SNAT port choice.
