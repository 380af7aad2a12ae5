"""Search: greedy and batched prefix beam search over CTC log-probs."""
