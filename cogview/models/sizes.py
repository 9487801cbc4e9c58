"""The GPT's sizes as a table. Weights: 12 L H^2 + 17 L H in blocks with four norms each, plus the embeddings."""

from cogview.models.gpt import GPTConfig

# init_std 0.02 is about 1 / sqrt(2560), for the width of "4b"; a narrow model starts at its own 1 / sqrt(width), or
# its attention stays close to uniform for hundreds of steps.
# "4b" is the released model: 58,240 and 1,089 rows of embeddings and 48 layers make 3,928,849,920 parameters.
SIZES: dict[str, GPTConfig] = {
    "tiny": GPTConfig(num_layers=3, hidden_size=128, num_heads=4, dropout=0.0, init_std=0.088),
    "small": GPTConfig(num_layers=12, hidden_size=768, num_heads=12),
    "tutorial": GPTConfig(num_layers=12, hidden_size=1024, num_heads=16),
    "3b": GPTConfig(num_layers=36, hidden_size=2560, num_heads=40, max_positions=2600),  # fashion: 50 x 50 codes
    "4b": GPTConfig(num_layers=48, hidden_size=2560, num_heads=40),
    # CogLM's: 150,010 ids and 1,024 positions make 5,902,307,328 parameters.
    "6b": GPTConfig(vocab_size=150_010, max_positions=1024, num_layers=48, hidden_size=3072, num_heads=48),
}
