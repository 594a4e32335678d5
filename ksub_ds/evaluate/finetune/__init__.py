"""Fine-tuning one classifier."""
