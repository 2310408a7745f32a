"""The six networks of the ensemble (section 4.2.3), each a short diff of BN-x30."""
