"""What the demonstration needs: text that is already on disk, and the accounting of a published model."""
