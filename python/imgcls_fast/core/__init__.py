"""The nouns that every other room speaks: configuration, manifest, batch, predictions, run, bundle."""
