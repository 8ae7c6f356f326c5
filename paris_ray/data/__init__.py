"""From images and captions to the partition: sources, frozen encoders, embedding, k-means."""
