"""Every key there is, with its default. A recipe starts from here and changes values; it never adds keys.

Any value can be overridden on the command line: `--config.optim.learning_rate=3e-4`.
Sizes are in tokens, steps or pairs; there are no other units.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the complete configuration, locked against new keys."""
    config = ConfigDict()

    # Root of all randomness: parameters, dropout, order of the data.
    config.seed = 0
    # Optimiser steps of the whole run; the schedule ends here.
    config.steps = 1000
    # Weights to begin with: hf:FOLDER (the families of models/families.py), or WORKDIR[@STEP] of another run; empty: random
    # ones. Sizes and choices of config.model are then that model's, and the data must have its tokenizer (prepare
    # --tokenizer=hf:FOLDER).
    config.init_from = ""
    # A line on the screen, in TensorBoard and in metrics.jsonl every so many steps.
    config.log_every = 20
    # The query-key test on the validation split every so many steps (0: never).
    config.eval_every = 0
    # A checkpoint every so many steps (0: only at the end), of which the newest `keep` stay.
    config.checkpoint_every = 500
    config.keep = 3
    # The best checkpoint stays too (WORKDIR@best), by a score of the evaluation ("query_key/top5", "sts-stsb/test/spearman");
    # checkpoint_every must then be a multiple of eval_every. Empty: none does.
    config.keep_best = ""

    # Pairs whose activations are held at once (gradient caching: the same loss and gradient, a forward pass more), or the
    # tokens of their rows. 0 and 0: the whole batch.
    config.micro_batch = 0
    config.micro_batch_tokens = 0

    config.data = ConfigDict()
    # A folder made by `python -m contrastive_jax.prepare`.
    config.data.dir = "data/python"
    # Pairs in one global batch, over all devices and processes.
    config.data.batch_size = 256
    # Tokens of one row: at least the longest span with its delimiters; what is left is padding.
    config.data.length = 64
    # Packing: the spans of so many pairs share so many rows in each view (1 and 1: a row a span). Spans that do not fit are
    # cut. Rows twice as long as the longest span fill well: 48 pairs of 64 to 510 tokens in 15 rows of 1024 fill 90 % and lose
    # 0.4 % of the tokens, where a row of 512 a span is filled to 56 %. `fill` in the metrics tells.
    config.data.pack_pairs = 1
    config.data.pack_rows = 1
    # How two spans of a window become a positive pair: "neighbours".
    config.data.sampler = "neighbours"
    # Span lengths are uniform in [min_span, max_span]; the gap between them in [min_gap, max_gap] (0: adjacent).
    config.data.min_span = 62
    config.data.max_span = 62
    config.data.min_gap = 0
    config.data.max_gap = 0
    # Whether the anchor is the earlier span ("kept") or either one ("random").
    config.data.order = "random"
    # Wrap views as CPT-text does, [x] and {y}; the ids come from the tokenizer. False: bare spans.
    config.data.delimiters = True
    # Share of each domain in the batch, as (domain, weight) pairs; weights are normalised, domains not named are left out.
    # Empty: natural, every window of every domain once an epoch.
    config.data.weights = ()

    config.model = ConfigDict()
    # Blocks; 0 gives a bag of token embeddings.
    config.model.num_layers = 2
    # Width of the residual stream.
    config.model.d_model = 256
    config.model.num_heads = 4
    # Heads of keys and values; fewer than num_heads is grouped-query attention.
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.d_ff = 1024
    # "gelu", or gated: "geglu", "swiglu". GELU is its tanh approximation; "gelu_exact" and "geglu_exact" are not.
    config.model.mlp = "gelu"
    # "layernorm" or "rmsnorm".
    config.model.norm = "layernorm"
    # Added to the variance.
    config.model.norm_eps = 1e-5
    # "pre" (GPT, ModernBERT) or "post" (BERT).
    config.model.norm_position = "pre"
    # A norm after the last block; customary with "pre".
    config.model.final_norm = True
    # A norm right after the token and position embeddings (BERT, ModernBERT); with "pre" it is also that of the first block's
    # attention.
    config.model.embedding_norm = False
    # "learned", "rotary" or "none".
    config.model.position = "rotary"
    config.model.rope_theta = 10_000.0
    # Attention to earlier tokens only.
    config.model.causal = False
    # Attention to so many tokens on either side (0: all), but for the first of every `global_every` layers, which sees all;
    # local layers have rotary positions of their own.
    config.model.local_window = 0
    config.model.global_every = 3
    config.model.local_rope_theta = 10_000.0
    # "plain" (XLA), "fused" (a Pallas kernel on TPU, cuDNN on GPU), or "auto": fused where the device has it. All are equal.
    config.model.attention = "auto"
    # Biases in projections and LayerNorm.
    config.model.bias = True
    # Dropout of embeddings and of each residual branch, and of attention probabilities.
    config.model.dropout = 0.0
    config.model.attention_dropout = 0.0
    # Standard deviation of the weights' initial normal distribution.
    config.model.init_std = 0.02
    # Output projections start at zero, so that the encoder begins as a bag of its embeddings.
    config.model.zero_init_branches = False
    # How tokens become one vector: "mean", "cls" (first token) or "eos" (last token).
    config.model.pooling = "mean"
    # Width of the embedding after a linear projection; 0: d_model, no projection.
    config.model.embedding_dim = 0
    # What the backward pass recomputes: "none", "dots" (all but matrix products and attention), "attention" (all but
    # attention) or "full". More saved is not always faster: what the layers' loop saves it writes and reads back.
    config.model.remat = "none"
    # Blocks as one loop. Without it a step is faster, since a loop writes what it saves into stacks and reads it back, but
    # its compile time grows with the layers.
    config.model.scan = True
    # Type of activations and matrix products, "float32" or "bfloat16"; parameters, norms and softmax stay float32.
    config.model.dtype = "float32"

    config.objective = ConfigDict()
    # "infonce", "flatnce", "dcl" or "siglip".
    config.objective.name = "infonce"
    # Where negatives come from: each device's own rows ("local"), or all rows, "gathered" at once or travelling in a "ring".
    # The last two are equal; a ring needs memory for one device's rows only, and transfers while it computes.
    config.objective.where = "gathered"
    # Rows and columns of a tile of the score matrix, which is never stored whole.
    config.objective.block = 4096
    # Type of the embeddings in the products and on their way; "bfloat16" halves the traffic. Sums are float32 either way.
    config.objective.dtype = "float32"
    # Positives look for their anchor too, not only anchors for their positive (siglip has every pair already).
    config.objective.symmetric = True
    # Temperature of the logits: its start, the range it is held in, and whether it is trained.
    config.objective.temperature = 0.05
    config.objective.temperature_min = 0.01
    config.objective.temperature_max = 1.0
    config.objective.temperature_trainable = True
    # Start of siglip's trainable bias.
    config.objective.bias = -10.0
    # Share of the target spread over all keys; infonce only.
    config.objective.label_smoothing = 0.0
    # The last so many views of a row are its hard negatives, the others after the anchor its positives.
    config.objective.hard_negatives = 0
    # Train prefixes of the embedding, as (size, weight) pairs (Matryoshka); the loss is their weighted mean. Empty: the whole.
    config.objective.matryoshka = ()
    # Spans of one document are not each other's negatives.
    config.objective.mask_same_document = True
    # Rows that share a text are not each other's negatives, and of rows that are equal only the first counts.
    config.objective.mask_duplicates = True
    # Pairs more similar than the positive by this margin are no negatives (None: they are).
    config.objective.mask_margin = placeholder(float)
    # Batches of keys in the queue of a momentum encoder (MoCo); 0: no queue, negatives from the batch.
    config.objective.queue = 0
    # The momentum encoder keeps this share of itself a step.
    config.objective.momentum = 0.999

    config.optim = ConfigDict()
    # AdamW.
    config.optim.learning_rate = 1e-3
    config.optim.b1 = 0.9
    config.optim.b2 = 0.98
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.01
    # First pattern that matches a parameter's path decides; each parameter must be matched. (regex, factor).
    config.optim.weight_decay_rules = ((r"norm|bias|embedding|objective", 0.0), (r".*", 1.0))
    config.optim.learning_rate_rules = ((r".*", 1.0),)
    # Linear warm-up, then "cosine", "linear" (both down to end_factor × learning_rate), "rsqrt" or "constant".
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.end_factor = 0.0
    # Gradients are scaled down to this global norm (0: never).
    config.optim.clip_norm = 1.0

    config.guard = ConfigDict()
    # Steps in a row that may be skipped because loss, gradient or new parameters are not finite; one more stops the run.
    config.guard.skipped_in_a_row = 10
    # Collapse: a warning, or after `patience` log lines in a row the end, where a statistic of the embeddings is below these
    # (0: never) once these steps and those of optim.warmup_steps are over. The effective rank is 1 where all lie on a line;
    # the standard deviation, of the whole vector, is 0 where all are one, 0.1 at a mean cosine of 0.99, and 1 where they are
    # evenly spread. (Before training the shipped recipes have 0.3 and more, and ranks near 100.)
    config.guard.warmup_steps = 100
    config.guard.patience = 3
    config.guard.effective_rank_warn = 4.0
    config.guard.effective_rank_stop = 2.0
    config.guard.embedding_std_warn = 0.2
    config.guard.embedding_std_stop = 0.1
    # A temperature that changes by more than these factors in one step: a warning, the end.
    config.guard.temperature_jump_warn = 1.1
    config.guard.temperature_jump_stop = 1.5

    config.mesh = ConfigDict()
    # Devices along each axis; one of them may be -1: all that remain.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.eval = ConfigDict()
    # Tasks every eval_every steps beside the query-key test, "sts=DIR,retrieval=DIR" (see evaluate).
    config.eval.tasks = ""
    # The query-key test: pairs, tokens of a span, rows embedded at once, seed of the choice.
    config.eval.pairs = 1000
    config.eval.span = 62
    config.eval.batch_size = 200
    config.eval.seed = 0
    return config.lock()
