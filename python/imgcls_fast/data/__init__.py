"""Images and labels: where they come from, which can be decoded, how they are split, and how they reach the model."""
