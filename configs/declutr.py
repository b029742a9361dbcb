"""DeCLUTR: a long anchor, and two shorter spans that overlap it or touch it as its positives.

    contrastive-jax train --config=configs/declutr.py --workdir=runs/declutr

Giorgi et al., arXiv 2006.03659, §3. Lengths are those of the debug recipe; the paper has 32 to 512 tokens, of documents of
2,048 or more. As a bag of embeddings (benchmarks/systems.py, three seeds) query-key top-5 / top-1 is 66.3 / 40.4 %, where
TF-IDF has 63.7 / 41.6 %, and InfoNCE on neighbouring spans 77.6 / 49.0 %.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.update(steps=200, eval_every=100, checkpoint_every=100)
    config.data.update(sampler="declutr", views=3, min_span=16, max_span=62)
    config.noise.update(ops=(("mask", 0.15),), views=(0,))  # of the anchors, whose embeddings are those with masks
    config.tokens.update(name="mlm", head="mlp", positions=12)  # 15 % of 62 are 9
    config.objective.update(pairing="both", positives="mean", temperature_trainable=False)
    return config
