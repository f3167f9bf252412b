"""What peft's own test-suite runs on: every registered method, through the same shapes that peft tests its LoRA on.

A method needs no entry here: the rows come from the registry. A recipe (`trainable = False`) has none: it makes no
layers and takes no target modules, and every row trains, saves or merges what a target module was given. Where a new
adapter leaves the output as it was only with some arguments (`ZooConfig.identity`), the rows are doubled: peft's tests
of a fresh adapter run with them.
"""

from peft import LoraConfig

from peft_zoo import methods

ROWS = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0"], "rank_pattern": {"lin0": 2}}),
    ("EmbConv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D 2", "EmbConv1D", {"target_modules": ["emb"]}),
    ("EmbConv1D 3", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d 1", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2dGroups 1", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Parameter 1", "MlpUsingParameters", {"target_modules": [], "target_parameters": ["lin0.weight"]}),
]
# peft's tests take SGD steps of 0.5, but 0.01 for its own RandLoRA "otherwise we get nan": a smaller scale does too.
# LQ-LoRA's usual rank of 64 is more than the models of these tests have, where peft combines no adapters; its usual
# scale of 16 / 64 moves factors by less than they ask for. A watermark's usual rank of 4 is less than their convolution
# has groups, of which peft wants a divisor.
GENTLE = {"randlora": {"randlora_alpha": 32}, "lq_lora": {"r": 8, "lora_alpha": 8}, "watermark_lora": {"r": 8}}
MERGE_GROUPS = (
    "merge_layers(_fp16|_is_idempotent|_is_deterministic_in_train_mode)?|safe_merge|forward_b?float16(_no_autocast)?|"
    "disable_adapters_with_merging|delete_merged_adapter_(raises_without_mutation|only_rejects_the_merged_one)"
)
IN_QUICK = ("MLP 1", "MLP 3", "EmbConv1D 3", "Conv2d 2", "MLP 2 identity", "EmbConv1D 2 identity")

CONFORMANCE, QUICK, SKIP = [], [], []
LACKS, INIT_FALSE, CONFIG_KWARGS = {}, {}, {}
for method in methods().values():
    config_cls = method.config_cls
    if not method.trainable:
        continue
    gentle = GENTLE.get(method.name, {})
    rows = [(f"{method.name} {title}", model, {**gentle, **kwargs}) for title, model, kwargs in ROWS]
    if issubclass(config_cls, LoraConfig):
        LACKS[config_cls] = {"quantization"}  # peft's LoRA has quantized layers of its own, not the generic ones
        INIT_FALSE[config_cls] = {"init_lora_weights": False}
        SKIP += [
            (
                rf"::test_({MERGE_GROUPS})\[{method.name} Conv2dGroups",
                "peft's layer does not merge a LoRA of a convolution in groups, and says so; its suite skips these "
                "tests for LoraConfig, by that very class",
            ),
            (
                rf"::test_registration\[.*{config_cls.__name__}",
                "its tensors are those of a LoRA, so its prefix is lora_ and does not follow from its type; that "
                "transformers adds, saves, loads and deletes it all the same is test_add_save_load_delete",
            ),
        ]
    elif config_cls.identity:
        rows += [(f"{title} identity", model, {**kwargs, **config_cls.identity}) for title, model, kwargs in rows]
        SKIP += [
            (
                rf"::test_disable_adapters(_with_merging)?\[{method.name} (?!.*identity)",
                f"needs a fresh adapter that changes nothing: tested with {config_cls.identity}",
            ),
            (
                rf"::test_only_params_are_updated\[{method.name} EmbConv1D \d-",
                "three steps of SGD at a fixed rate, on base weights of 0.02, move the factors by less than it asks "
                f"for; tested with {config_cls.identity}",
            ),
        ]
    CONFORMANCE += [(title, model, config_cls, kwargs) for title, model, kwargs in rows]
    QUICK += [title for title, _, _ in rows if title.removeprefix(f"{method.name} ") in IN_QUICK]
    if "r" in gentle:
        CONFIG_KWARGS[config_cls] = gentle  # a test of combined adapters counts on peft's rank of 8
    if method.name == "lq_lora":
        SKIP.append(
            (
                rf"::test_get_base_model_state_dict\[{config_cls.__name__}",
                "it compares the base with what it was before: here it is quantized, and its weights are packed codes",
            )
        )
