"""Every configuration key, with its default, its bounds and its meaning. Sizes are counted in tokens, steps or pairs."""

from contrastive_jax.config.rules import (
    LAYERS,
    NGRAMS,
    NUMBER,
    NUMBER_OR_NONE,
    OPTIONS,
    SIZES,
    Key,
    Rule,
    above,
    any_of,
    at_least,
    between,
    choice,
    choice_or_none,
    mesh_size,
    pairs,
)

KEYS = {
    # Seed of all randomness: parameters, dropout, order of the data.
    "seed": Key(0, at_least(0)),
    # Optimiser steps of the whole run; the learning-rate schedule ends here.
    "steps": Key(1000, at_least(1)),
    # A model whose weights training starts from: hf:FOLDER (a Hugging Face folder), a folder written by `export`, or
    # WORKDIR[@STEP|@best] of another run. Empty: random weights. The sizes and choices of config.model are then taken from
    # that model, and the data must have its tokenizer (prepare --tokenizer=hf:FOLDER).
    "init_from": Key(""),
    # How many times as wide as the model of init_from this one is: copies of its width, heads and d_ff side by side, which give
    # the same cosines. 1: as it is.
    "init_widen": Key(1, at_least(1)),
    # Which blocks of the model of init_from this one has, in this order: (0, 2, 4) makes three. Empty: all.
    "init_layers": Key((), Rule("give numbers of blocks, as in (0, 2)", lambda layers: all(type(i) is int for i in layers))),
    # Write a log line (console, TensorBoard, metrics.jsonl) every N steps.
    "log_every": Key(20, at_least(1)),
    # An experiment tracker that also gets the metrics, "wandb" or "trackio", each an extra of this package; empty: none.
    "tracker": Key("", choice_or_none("wandb", "trackio")),
    # Every N steps run the query-key test on the validation split, score the labels of its pairs where the objective learns
    # them, and run the tasks of eval.tasks; 0: never.
    "eval_every": Key(0, at_least(0)),
    # Save a checkpoint every N steps (0: only at the end); the newest `keep` are kept.
    "checkpoint_every": Key(500, at_least(0)),
    "keep": Key(3, at_least(1)),
    # Also keep the checkpoint with the best value of this score (WORKDIR@best), for example "query_key/mean/top5" or
    # "sts-stsb/test/spearman"; checkpoint_every must then be a multiple of eval_every. What a run saves because it is told to
    # end has no score, and is never the best. Empty: keep none.
    "keep_best": Key(""),
    # Gradient caching: encode this many pairs at once, or rows with this many tokens, instead of the whole batch. Loss and
    # gradient are the same; it costs one more forward pass. At most one of the two may be set; both 0: the whole batch.
    "micro_batch": Key(0, at_least(0)),
    "micro_batch_tokens": Key(0, at_least(0)),
    # Options of XLA for the step, as (name, value) pairs, which win over those of training/compiler_options.py:
    # (("xla_tpu_scoped_vmem_limit_kib", "65536"),). An option of another platform than the run's is left out.
    "xla_options": Key((), OPTIONS),
    # The folder of a prepared dataset (`contrastive-jax prepare`). Several, separated by commas, must have one tokenizer.
    "data.dir": Key("data/python"),
    # The local folder to which each machine copies a dataset from a bucket, to read it there. Empty: gs:// is read in place, a
    # request per chunk of up to 128 records, and s3:// is copied to ~/.cache/contrastive_jax/buckets.
    "data.cache_dir": Key(""),
    # The most GB of copies in that folder, whose other files are neither counted nor deleted; 0: no limit. Copies used less
    # recently make room. File shards of gs:// that do not fit are read in place. On gs:// it needs data.cache_dir.
    "data.cache_gb": Key(0.0, at_least(0)),
    # Pairs per step, over all devices and processes.
    "data.batch_size": Key(256, at_least(1)),
    # How often the step sees each span: 2 adds a second row of the same text, which has dropout (and noise) of its own. The
    # views x, y of a sampler become x, y, x, y.
    "data.copies": Key(1, at_least(1)),
    # Two views in one row, one after the other: view 0 with view 1 ("next": one row per pair), or each with the other ("both").
    # The embedding is that of the first. Empty: a row per view.
    "data.join": Key("", choice_or_none("next", "both")),
    # Next-sentence prediction, with join="next": so often the second text of a row is that of another document, half a batch
    # away; its label is then 1, else 0. objective.name="softmax" tells them apart, with its weight.
    "data.random_next": Key(0.0, between(0, 1)),
    # Tokens per row: at least the longest span with its delimiters; the rest is padding.
    "data.length": Key(64, at_least(1)),
    # Packing: the spans of `pack_pairs` pairs share `pack_rows` rows per view; 1 and 1: one span per row. Spans that do not fit
    # are truncated. Rows twice as long as the longest span fill well: 48 pairs of 64 to 510 tokens in 15 rows of 1024 tokens
    # fill 90 % and lose 0.4 % of the tokens, where one span per row of 512 fills 56 %. `fill` in the metrics shows the share.
    "data.pack_pairs": Key(1, at_least(1)),
    "data.pack_rows": Key(1, at_least(1)),
    # How the views of a pair are cut from a record: spans that follow one another ("neighbours"), one span alone ("span"), two
    # runs of whole sentences ("sentences", CoLE), an anchor and spans around it ("declutr"), or the texts of a pair
    # ("fields", of data that was prepared with --pairs).
    "data.sampler": Key("neighbours", choice("neighbours", "span", "sentences", "declutr", "fields")),
    # Span lengths are uniform in [min_span, max_span] ("declutr": by Beta distributions); the gap between spans is uniform in
    # [min_gap, max_gap] (0: adjacent). Runs of sentences have at most max_span tokens, their records at least 2 × min_span.
    "data.min_span": Key(62, at_least(1)),
    "data.max_span": Key(62, at_least(1)),
    "data.min_gap": Key(0, at_least(0)),
    "data.max_gap": Key(0, at_least(0)),
    # How many views are cut: neighbours; an anchor and its positives ("declutr"); or the texts taken of a pair ("fields"), its
    # query, positives and hard negatives, of which those of more than max_span tokens lose their end.
    "data.views": Key(2, at_least(1)),
    # fields: how many of the views are hard negatives, the last ones: keys that are wrong for their anchor and for all others.
    # Of a pair with more positives or hard negatives, others are drawn in each step.
    "data.hard_negatives": Key(0, at_least(0)),
    # fields: the tokens per row of view 0, with its delimiters, where queries are shorter than documents; 0: data.length.
    # Longer queries lose their end.
    "data.query_length": Key(0, at_least(0)),
    # neighbours, sentences: whether the query is always the earlier span ("kept") or either of the two ("random").
    "data.order": Key("random", choice("random", "kept")),
    # sentences: how many make a run, and how many lie between the two at least and at most; None: any number.
    "data.sentences": Key(3, at_least(1)),
    "data.min_separation": Key(1, at_least(0)),
    "data.max_separation": Key(int, Rule("must be at least 0, or None", lambda v: v is None or v >= 0)),
    # declutr: whether the positives lie inside the anchor ("subsuming"), border on it ("adjacent"), or touch it anyhow.
    "data.strategy": Key("default", choice("default", "subsuming", "adjacent")),
    # Put each view between its delimiter tokens as CPT-text does, [x] and {y}; the tokenizer reserves their ids. False: bare
    # spans.
    "data.delimiters": Key(True),
    # The share of each domain in the pairs, as (name, weight) pairs: weights need not sum to 1, and domains that are not named
    # are left out. A name is a domain, or, where data.dir lists several datasets, a dataset (the last part of its path) or
    # DATASET/DOMAIN. The records of each name have epochs of their own. Empty: data.alpha decides.
    "data.weights": Key((), pairs(str)),
    # Without weights: a domain's share of the pairs is proportional to its number of records to this power. 1: all records come
    # equally often; 0: all domains do, and so the records of small ones more often. With one_source="dataset" this is said of
    # datasets instead of domains.
    "data.alpha": Key(1.0, at_least(0)),
    # Take all pairs of a step from one "domain" or one "dataset", in turns by their shares. Empty: from all of them.
    "data.one_source": Key("", choice_or_none("domain", "dataset")),
    # How many records are shuffled among one another; which ones is drawn anew in each epoch, in chunks of up to 128 records.
    # They are held in memory with a quarter as many that come next: 2.8 KB for each of them if records have 1,024 tokens, over
    # all processes together. Many domains with shares of their own take up to five times as much.
    "data.shuffle_records": Key(131_072, at_least(1)),
    # Transformer blocks; 0: a bag of token embeddings.
    "model.num_layers": Key(2, at_least(0)),
    # What mixes the tokens in a block: "attention"; "fourier" (FNet), "linear" (ResMLP), "mlp" (MLP-Mixer), "gmlp", "amlp"
    # (gMLP with a head of attention), whose rows are padded to max_length; "external" (External Attention), "conv" (lightweight
    # convolution over local_window tokens on either side) or "lstm" (in both directions). num_heads × head_dim is also the
    # number of slots of "external", the hidden width over tokens of "mlp" and the units per direction of "lstm".
    "model.mixer": Key(
        "attention", choice("attention", "fourier", "linear", "mlp", "gmlp", "amlp", "external", "conv", "lstm")
    ),
    # Width of the residual stream.
    "model.d_model": Key(256, at_least(1)),
    "model.num_heads": Key(4, at_least(1)),
    # Key and value heads; fewer than num_heads: grouped-query attention.
    "model.num_kv_heads": Key(4, at_least(1)),
    "model.head_dim": Key(64, at_least(1)),
    "model.d_ff": Key(1024, at_least(1)),
    # The longest text in tokens, delimiters included: the size of a learned position table, the length to which some mixers pad
    # rows, and where inference, evaluations and exports truncate. Training rows (data.length) may be shorter.
    "model.max_length": Key(512, at_least(1)),
    # The MLP: plain, or gated (the "glu" ones), or "none". "gelu" and "geglu" use the tanh approximation of GELU, the "exact"
    # ones do not; "quick_gelu" is x σ(1.702 x).
    "model.mlp": Key("gelu", choice("gelu", "gelu_exact", "quick_gelu", "geglu", "geglu_exact", "swiglu", "none")),
    # "affine" scales and shifts each channel, without statistics.
    "model.norm": Key("layernorm", choice("layernorm", "rmsnorm", "affine")),
    # Added to the variance in norms.
    "model.norm_eps": Key(1e-5, above(0)),
    # Whether blocks normalise their input ("pre": GPT, ModernBERT) or their output ("post": BERT).
    "model.norm_position": Key("pre", choice("pre", "post")),
    # A norm after the last block; customary with "pre".
    "model.final_norm": Key(True),
    # A norm right after the token and position embeddings (BERT, ModernBERT). With "pre" the first block's attention then has
    # no norm of its own.
    "model.embedding_norm": Key(False),
    # Embeddings of n-grams too, as (tokens of an n-gram, rows of its table) pairs: ((2, 131072),) hashes each pair of
    # neighbouring tokens to one of 131,072 rows, which is added to the embedding of the second. Empty: none.
    "model.ngrams": Key((), NGRAMS),
    "model.position": Key("rotary", choice("learned", "rotary", "none")),
    "model.rope_theta": Key(10_000.0, above(0)),
    # Attend to earlier tokens only.
    "model.causal": Key(False),
    # What the two texts of a joined row (data.join) see of each other: everything ("full": BERT), or the second, token by
    # token, all of the first ("prefix": UniLM) or its first token alone ("bottleneck": TSDAE), and the first nothing.
    "model.part_mask": Key("prefix", choice("full", "prefix", "bottleneck")),
    # Attend to this many tokens on either side (0: all), except in the first of every `global_every` layers, which attends to
    # all. Local layers have rotary positions with their own base. The mixer "conv" does not look at global_every.
    "model.local_window": Key(0, at_least(0)),
    "model.global_every": Key(3, at_least(1)),
    "model.local_rope_theta": Key(10_000.0, above(0)),
    # "plain" (XLA), "fused" (a Pallas kernel on TPU, cuDNN on GPU), or "auto": fused where the device has it. All give equal
    # results.
    "model.attention": Key("auto", choice("auto", "plain", "fused")),
    # Biases in projections and LayerNorm.
    "model.bias": Key(True),
    # Dropout of embeddings and of each residual branch, and of attention probabilities.
    "model.dropout": Key(0.0, between(0, 1)),
    "model.attention_dropout": Key(0.0, between(0, 1)),
    # Standard deviation of the weights' initial normal distribution: that of all ("normal"), or of kernels divided by the root
    # of their number of inputs ("fan_in"). The last kernel of each residual branch has 1 / (2 num_layers) of the variance.
    "model.init": Key("normal", choice("normal", "fan_in")),
    "model.init_std": Key(0.02, at_least(0)),
    # Initialise the last projection of each residual branch to zero, so that the encoder starts as a bag of its embeddings.
    "model.zero_init_branches": Key(False),
    # How token states become one vector: "mean", "max" (in each channel), "first_last" (the mean of the first and the last
    # block's states, over the tokens), "cls" (the first token) or "eos" (the last token).
    "model.pooling": Key("mean", choice("mean", "max", "first_last", "cls", "eos")),
    # Whether the mean is weighted, with a trained weight per token id, as inverse document frequencies are; all begin at 1.
    "model.token_weights": Key(False),
    # A tanh "before" or "after" the pooling; empty: none.
    "model.pool_tanh": Key("", choice_or_none("before", "after")),
    # Width of the embedding after a linear projection; 0: d_model, no projection.
    "model.embedding_dim": Key(0, at_least(0)),
    # Instead of one projection, several layers, as (width, activation, bias): ((3072, "identity", False), (768, "tanh", True)).
    # The embedding has the last width. Empty: none.
    "model.dense": Key((), LAYERS),
    # UniVAE: in the last `latent_layers` blocks the first token's state passes through so many numbers on a sphere, drawn
    # around their mean direction with this concentration in training; the mean directions are the embedding. 0: none.
    "model.latent": Key(0, at_least(0)),
    "model.latent_layers": Key(4, at_least(1)),
    "model.latent_kappa": Key(32.0, above(0)),
    # What the backward pass recomputes: "none", "dots" (all but matrix products and the result of the mixer, before attention's
    # projection), "attention" (all but that result) or "full"; the statistics of norms never. Saving more is not always
    # faster: the loop over layers writes what it saves and reads it back.
    "model.remat": Key("none", choice("none", "dots", "attention", "full")),
    # What it does not recompute besides, as (name, blocks) pairs, in the first so many blocks: "query", "key", "value" (after
    # the rotation by position), "middle" (token states plus the mixer's result), "up" (before the MLP's activation):
    # (("query", 24), ("up", 2)) may fill the memory that is left. In a loop over blocks (scan) all of them save the same.
    "model.saved": Key((), pairs(str)),
    # Run the blocks as one loop (lax.scan). Without it a step is faster, but compile time grows with the number of layers.
    "model.scan": Key(True),
    # Type of activations and matrix products; parameters, norms and softmax stay float32.
    "model.dtype": Key("float32", choice("float32", "bfloat16")),
    # Type to which the factors of the linear maps' products are rounded where activations are float32. Products in bfloat16
    # with sums in float32 are what a TPU computes by default; a CPU without AVX512-BF16 or AMX is slower at them.
    "model.products": Key("float32", choice("float32", "bfloat16")),
    # A loss of pairs, without negatives ("simsiam", "byol"), or of labels: classes ("softmax") or scores ("cosent", "cosine").
    # Of a target (memory.kind): the cosines in a batch follow its cosines ("similarity"), or each embedding its embedding
    # ("embedding"). Of a teacher's scores of a pair's documents: "margin_mse", "kl". Also the names of objective.extra.
    "objective.name": Key(
        "infonce",
        choice(
            *("infonce", "flatnce", "dcl", "siglip", "dv", "mine", "nwj", "jsd"),
            *("simsiam", "byol", "softmax", "cosent", "cosine", "similarity", "embedding", "margin_mse", "kl"),
            *("spread_mean", "spread_square"),
        ),
    ),
    # Weight of this loss in the total; 0: it is not built, and the total is that of all others.
    "objective.weight": Key(1.0, at_least(0)),
    # Losses of the embeddings to add, as (name, weight) pairs: "similarity", "embedding", "margin_mse" or "kl" (see name), and
    # the spread-out regulariser of all texts of each view: the square of their mean cosine ("spread_mean"), and by how much
    # their mean squared cosine exceeds that of random directions ("spread_square").
    "objective.extra": Key((), pairs(str)),
    # Who is paired: view 0 with each other view ("first"); each of two views with the other, among both views of all pairs
    # ("both": NT-Xent, 2n - 2 negatives); or every two views, a sum of losses ("all").
    "objective.pairing": Key("first", choice("first", "both", "all")),
    # Whether each positive of an anchor has its own loss ("each"), or their mean is the positive ("mean").
    "objective.positives": Key("each", choice("each", "mean")),
    # CPC: the width of a GRU over the views, whose state at view i predicts each later view; 0: none. Needs pairing="all".
    "objective.context": Key(0, at_least(0)),
    # Deep InfoMax: the positives are so many token states of the last view, chosen at random; 0: the other views.
    "objective.locals": Key(0, at_least(0)),
    # Where negatives come from: each device's own share of the batch ("local"), or the whole batch, either all-gathered
    # ("gathered") or passed around a ring of devices ("ring"). The last two are equal; a ring holds one device's share of the
    # embeddings at a time, and transfers while it computes.
    "objective.where": Key("gathered", choice("local", "gathered", "ring")),
    # Rows and columns of a tile of the score matrix, which is never stored whole.
    "objective.block": Key(4096, at_least(1)),
    # Type of the embeddings in the score products and in transfers; "bfloat16" halves the traffic. Sums are always float32.
    "objective.dtype": Key("float32", choice("float32", "bfloat16")),
    # Score in both directions: each positive also has to find its anchor (siglip's loss contains both already).
    "objective.symmetric": Key(True),
    # infonce: what joins the similarities of a query with all documents in one softmax: those of its document with all queries
    # ("document_query"), of the query with other queries ("query_query") and of its document with other documents
    # ("document_document"). GTE has all three, Qwen3 the last two. It needs symmetric=False, which has a softmax per direction.
    "objective.joint": Key((), any_of("document_query", "query_query", "document_document")),
    # Hardness weights: what is added to the logits of an anchor's negatives, times their similarity and without a gradient: of
    # keys of other pairs (LLaVE: 9), and of the anchor's own hard negatives (EmbeddingGemma: 5). 0: none.
    "objective.hardness": Key(0.0, at_least(0)),
    "objective.hardness_own": Key(0.0, at_least(0)),
    # The temperature of the logits: its start, the range it is clipped to, and whether it is trained.
    "objective.temperature": Key(0.05, above(0)),
    "objective.temperature_min": Key(0.01, above(0)),
    "objective.temperature_max": Key(1.0, above(0)),
    "objective.temperature_trainable": Key(True),
    # Initial value of the trainable bias in the logits of siglip, nwj and jsd.
    "objective.bias": Key(-10.0, NUMBER),
    # Decay of mine's moving average of the negatives' mean exponential.
    "objective.average_decay": Key(0.99, between(0, 1)),
    # Share of the target distribution spread over all keys; infonce only.
    "objective.label_smoothing": Key(0.0, between(0, 1)),
    # Matryoshka: also train prefixes of the embedding, as (size, weight) pairs; the loss is their weighted mean. Empty: off.
    "objective.matryoshka": Key((), pairs(int)),
    # Spans of one document are not each other's negatives.
    "objective.mask_same_document": Key(True),
    # Pairs that share a span's text are not each other's negatives, and of identical pairs only the first counts.
    "objective.mask_duplicates": Key(True),
    # A key whose similarity exceeds the positive's by more than this margin is not a negative; None: no such mask.
    "objective.mask_margin": Key(float, NUMBER_OR_NONE),
    # The margin is a share of the positive's similarity, without its sign.
    "objective.mask_relative": Key(False),
    # GISTEmbed: the margin is about the similarities of the target (memory.kind), a guide, not about the run's own.
    "objective.mask_guide": Key(False),
    # A target, a copy of encoder and objective that is not trained: "queue" (MoCo: it follows the parameters, and embeds the
    # positives, which join a queue of keys), "average" (BYOL: it follows, and embeds all views, for losses that use that), or
    # "frozen" (a teacher: it stays where training began); empty: none.
    "memory.kind": Key("", choice_or_none("queue", "average", "frozen")),
    # The frozen target is another model, of whatever size, named as in init_from, with the data's tokenizer. Empty: the run's
    # own start.
    "memory.source": Key(""),
    # Batches of keys in the queue.
    "memory.queue": Key(32, at_least(1)),
    # Decay of the target's moving average; with rise it grows to 1 at the end of the run, along a cosine.
    "memory.momentum": Key(0.999, between(0, 1)),
    "memory.rise": Key(False),
    # Noise on the tokens of each view, as (operation, share) pairs, applied in this order; delimiters and padding are spared.
    # Of the units, "mask" hides a share, "replace" puts random tokens there, "delete" removes it, "infill" puts one mask in the
    # place of each of its spans (BART), "sentinel" one id of its own (T5: all views but 0 get the other share in this way), and
    # "ngram" hides one of up to so many units in view 0 and keeps only it in the others (InfoWord). "permute" moves a share of
    # the sentences, "rotate" lets a share of the texts begin anywhere. Empty: none.
    "noise.ops": Key((), pairs(str)),
    # The views that have noise, from 0; empty: all.
    "noise.views": Key((), Rule("give numbers of views, as in (0,)", lambda views: all(type(v) is int for v in views))),
    # The share of the rows of these views that have none all the same, drawn for each row.
    "noise.clean_rows": Key(0.0, between(0, 1)),
    # What is picked: tokens, whole words, or spans of 1 to 10 words (SpanBERT).
    "noise.unit": Key("token", choice("token", "word", "span")),
    # Pick the share of the units in every row (BERT), rather than each unit with this chance; spans always do.
    "noise.exact": Key(True),
    # mask: how much of what is picked becomes random tokens, and how much stays as it is.
    "noise.random_share": Key(0.1, between(0, 1)),
    "noise.kept_share": Key(0.1, between(0, 1)),
    # The mean length of spans in units: of "infill" (Poisson) and of "sentinel".
    "noise.span_mean": Key(3.0, above(0)),
    # A loss of the token states, computed in the same pass, whose head is not exported: "mlm" (predict what stood at the places
    # that noise has picked), "replaced" (tell these places from all others) or "bilm" (ELMo: predict the next token and the one
    # before), "lm" (GPT: predict the next token), "seq2seq" (the same in the second part of joined rows) or "distil"
    # (DistilBERT: "mlm", and the predictions and states of a frozen target, memory.kind); empty: none.
    "tokens.name": Key("", choice_or_none("mlm", "replaced", "bilm", "lm", "seq2seq", "distil")),
    # Weight of the token loss in the total; 0: it is not built.
    "tokens.weight": Key(1.0, at_least(0)),
    # What stands between token states and predictions: nothing ("linear"), or a dense layer with GELU and a norm ("mlp": BERT).
    # "bilm" has a linear map per direction.
    "tokens.head": Key("linear", choice("linear", "mlp")),
    # At most this many picked tokens of a row are predicted, the first ones; 0: all. Fewer cost less memory and time.
    "tokens.positions": Key(0, at_least(0)),
    # distil: weights of the terms "mlm", "kl" (the teacher's predictions, at all tokens) and "cosine" (its token states, which
    # then are as wide), and the temperature of the predictions.
    "tokens.distil": Key((("kl", 5.0), ("mlm", 2.0), ("cosine", 1.0)), pairs(str)),
    "tokens.temperature": Key(2.0, above(0)),
    # simsiam, byol: widths of the layers of the projector and of the predictor on top of it. Hidden layers have batch norm over
    # the whole batch. An empty projector is the identity; the predictor must end at the width that it starts from.
    "heads.projector": Key((2048, 2048), SIZES),
    "heads.predictor": Key((512, 2048), SIZES),
    # softmax: the classes of each label space, one number of several spaces after the other: (2, 3) has classes 0 and 1 in one
    # space, 2 to 4 in another, and a pair sees only the logits of its own space.
    "labels.classes": Key((2,), Rule("give one number of classes or more, as in (3,)", lambda v: bool(v) and SIZES.holds(v))),
    # softmax: whether the classifier of [u, v, |u - v|] also sees u · v, element by element, and whether it has a bias.
    "labels.product": Key(False),
    "labels.bias": Key(True),
    # softmax: R-Drop's weight of the divergence between the two copies of a pair (data.copies=2); 0: none. Pairs without a
    # label count in it too.
    "labels.rdrop": Key(0.0, at_least(0)),
    # cosine: the label whose pairs should have a cosine of 1.
    "labels.scale": Key(1.0, above(0)),
    # margin_mse, kl: by what the cosines, and by what the teacher's scores are divided before they are compared.
    "scores.temperature": Key(1.0, above(0)),
    "scores.teacher_temperature": Key(1.0, above(0)),
    # AdamW.
    "optim.learning_rate": Key(1e-3, above(0)),
    "optim.b1": Key(0.9, between(0, 1)),
    "optim.b2": Key(0.98, between(0, 1)),
    "optim.eps": Key(1e-8, above(0)),
    "optim.weight_decay": Key(0.01, at_least(0)),
    # (regex, factor) pairs: the first pattern that matches a parameter's path decides; every parameter must be matched.
    "optim.weight_decay_rules": Key(((r"norm|bias|embedding|ngrams|objective", 0.0), (r".*", 1.0)), pairs(str)),
    "optim.learning_rate_rules": Key(((r".*", 1.0),), pairs(str)),
    # Rules as above; 1: these parameters have the peak rate at every step (SimSiam's predictor), 0: they follow the schedule.
    "optim.constant_rate_rules": Key(((r".*", 0.0),), pairs(str)),
    # Linear warm-up, then this decay; "cosine" and "linear" end at end_factor × learning_rate.
    "optim.schedule": Key("cosine", choice("cosine", "linear", "rsqrt", "constant")),
    "optim.warmup_steps": Key(100, at_least(0)),
    "optim.end_factor": Key(0.0, at_least(0)),
    # Scale gradients down to this global norm; 0: never.
    "optim.clip_norm": Key(1.0, at_least(0)),
    # Steps with a non-finite loss, gradient or parameter are skipped; more than this many in a row stop the run.
    "guard.skipped_in_a_row": Key(10, at_least(0)),
    # Collapse detection, active after max(warmup_steps, optim.warmup_steps). Below *_warn: log a warning. Below *_stop for
    # `patience` consecutive log lines: stop. 0 disables. The effective rank is 1 where all embeddings lie on one line. The
    # standard deviation of the whole vector is 0 where all embeddings are equal, 0.1 at a mean cosine of 0.99, and 1 where they
    # are evenly spread. (Untrained, the shipped recipes have 0.3 or more, and ranks near 100.)
    "guard.warmup_steps": Key(100, at_least(0)),
    "guard.patience": Key(3, at_least(1)),
    "guard.effective_rank_warn": Key(4.0, at_least(0)),
    "guard.effective_rank_stop": Key(2.0, at_least(0)),
    "guard.embedding_std_warn": Key(0.2, at_least(0)),
    "guard.embedding_std_stop": Key(0.1, at_least(0)),
    # If the temperature changes by more than these factors in one step: warn, stop.
    "guard.temperature_jump_warn": Key(1.1, above(1)),
    "guard.temperature_jump_stop": Key(1.5, above(1)),
    # Devices along each mesh axis; one of them may be -1: all that remain.
    "mesh.data": Key(-1, mesh_size()),
    "mesh.fsdp": Key(1, mesh_size()),
    "mesh.tensor": Key(1, mesh_size()),
    # Tasks to run every eval_every steps beside the query-key test: "sts=DIR,retrieval=DIR" (see evaluate --help).
    "eval.tasks": Key(""),
    # The query-key test: number of pairs, tokens per span, spans embedded at once, and the seed that chooses the spans.
    "eval.pairs": Key(1000, at_least(1)),
    "eval.span": Key(62, at_least(1)),
    "eval.batch_size": Key(200, at_least(1)),
    "eval.seed": Key(0, at_least(0)),
}
