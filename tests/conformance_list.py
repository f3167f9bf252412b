"""Rows of peft's own test-suite for every registered method, with the shapes on which peft tests its LoRA.

A method needs no entry here: rows come from the registry, and `Config.conformance` has what suits a method. A recipe
(`trainable = False`) has no rows, since every row trains, saves or merges an adapter layer. If a new adapter leaves the
output unchanged only with some arguments (`Config.identity`), the rows are doubled: peft's tests of a new adapter run
with these arguments.
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
MERGE_GROUPS = (
    "merge_layers(_fp16|_is_idempotent|_is_deterministic_in_train_mode)?|safe_merge|forward_b?float16(_no_autocast)?|"
    "disable_adapters_with_merging|delete_merged_adapter_(raises_without_mutation|only_rejects_the_merged_one)"
)
IN_QUICK = ("EmbConv1D 3", "Conv2d 2", "EmbConv1D 2 identity")

CONFORMANCE, QUICK = [], []
SKIP = [
    (
        r"::test_lora_conversion\[.*OPTForCausalLM",
        "it reads the target modules that peft chose off the configuration that get_peft_model was given; ours stays"
        " as it was. The test runs on the other models",
    ),
    (
        r"::test_save_pretrained_(selected_adapters_)?pickle\[",
        "a pickle can run code when it is opened: our types load safetensors only",
    ),
]
LACKS, INIT_FALSE, CONFIG_KWARGS = {}, {}, {}
for method in methods().values():
    config_cls = method.config_cls
    if not method.trainable:
        continue
    arguments = dict(config_cls.conformance.arguments)
    CONFIG_KWARGS[config_cls] = arguments
    own = rf"^(?=.*\[.*({method.name} |{config_cls.__name__}))"
    SKIP += [(f"{own}.*({pattern})", reason) for pattern, reason in config_cls.conformance.skips.items()]
    rows = [(f"{method.name} {title}", model, {**arguments, **kwargs}) for title, model, kwargs in ROWS]
    if issubclass(config_cls, LoraConfig):
        LACKS[config_cls] = {"quantization"}  # peft's LoRA has quantized layers of its own, not the generic ones
        INIT_FALSE[config_cls] = {"init_lora_weights": False}
        SKIP += [
            (
                rf"::test_({MERGE_GROUPS})\[{method.name} Conv2dGroups",
                "peft's layer does not merge a LoRA of a convolution in groups; its suite skips these tests for "
                "LoraConfig, by that very class",
            ),
            (
                rf"::test_weighted_combination_of_adapters\[.*{config_cls.__name__}",
                "it adds adapters by 'linear' at their own rank, which changes the sum; our types refuse that, and "
                "test_weighted checks every type of combination against the sum of the updates",
            ),
            (
                rf"::test_registration\[.*{config_cls.__name__}",
                "its tensors are those of a LoRA, so its prefix is lora_ and does not follow from its type; "
                "test_add_save_load_delete checks that transformers adds, saves, loads and deletes it",
            ),
        ]
    elif config_cls.identity:
        rows += [(f"{title} identity", model, {**kwargs, **config_cls.identity}) for title, model, kwargs in rows]
        SKIP += [
            (
                rf"::test_disable_adapters(_with_merging)?\[{method.name} (?!.*identity)",
                f"needs a new adapter that changes nothing: tested with {config_cls.identity}",
            ),
            (
                rf"::test_only_params_are_updated\[{method.name} EmbConv1D \d-",
                "three steps of SGD at a fixed rate, on base weights of 0.02, move the factors by less than it asks "
                f"for; tested with {config_cls.identity}",
            ),
        ]
    CONFORMANCE += [(title, model, config_cls, kwargs) for title, model, kwargs in rows]
    QUICK += [title for title, _, _ in rows if title.removeprefix(f"{method.name} ") in IN_QUICK]
