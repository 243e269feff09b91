"""Behind the recipes: the variants of a comparison and their statistics, the shipped backbone, a distillation.

`variants` trains models that differ in one thing each, `significance` says how sure a difference is; the comparisons,
`recipes.quickstart` and `recipes.study` rest on both. `prompted` is the baseline behind the BToks' own prompt as plain
text. `pretrain` made the shipped backbone, `seeing` puts together one that sees photographs; `distill_to_last_token`
turns a mean model into a last-token one. Of `pretrain` and `distill_to_last_token` those files hold the flags;
`pretraining` and `distillation` do the work.

Rule: imports `data`, `toy` and `training`, never a command at the top.
"""
