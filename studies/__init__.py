"""What trains and measures the small model: its question task, its weights, the accuracy that pruning keeps."""
