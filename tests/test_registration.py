"""Our types behave as peft's own do: as enum members, in files, in other processes, whatever is imported when."""

from __future__ import annotations

import copy
import json
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method

import peft_zoo
from peft_zoo import Method, registration

METHODS = list(peft_zoo.methods().values())
NATIVE = PeftType.LORA
# Optional packages that cost time to import and are not what is tested.
HIDE = "import sys\nfor name in 'torchvision', 'torchao', 'bitsandbytes': sys.modules[name] = None\n"


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    """One of the registered methods."""
    return request.param


@pytest.fixture
def member(method: Method) -> PeftType:
    """Member of `PeftType` of the method."""
    return PeftType(method.peft_type)


def run(code: str, folder: Path, *arguments: str, hide: bool = True) -> list[str]:
    """Runs a program and returns the lines it prints; every warning is an error where optional packages are hidden."""
    environment = {name: value for name, value in os.environ.items() if name != "PEFT_ZOO_AUTOLOAD"}
    command = [sys.executable, *(["-W", "error", "-c", HIDE + code] if hide else ["-c", code]), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestMember:
    def test_found_by_value_name_and_attribute(self, method: Method, member: PeftType) -> None:
        assert PeftType[method.peft_type] is member
        assert getattr(PeftType, method.peft_type) is member
        assert PeftType(member) is member
        assert PeftType.__members__[method.peft_type] is member

    def test_name_and_value(self, method: Method, member: PeftType) -> None:
        assert member.name == member.value == method.peft_type == f"ZOO_{method.name}".upper()
        assert member == method.peft_type
        assert hash(member) == hash(method.peft_type)
        assert {member: 1}[method.peft_type] == 1

    def test_listed_once_like_any_other(self, member: PeftType) -> None:
        everything = list(PeftType)
        assert everything.count(member) == 1
        assert len(PeftType) == len(everything) == len(set(everything)) == len(PeftType.__members__)
        assert list(reversed(PeftType)) == everything[::-1]
        assert member in PeftType
        assert NATIVE in everything

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="`in` takes values since Python 3.12")
    def test_its_value_is_in_the_enum(self, method: Method) -> None:
        assert method.peft_type in PeftType

    def test_a_true_member(self, member: PeftType) -> None:
        assert isinstance(member, PeftType)
        assert isinstance(member, str)
        assert type(member) is PeftType
        assert member is not NATIVE and member != NATIVE

    @pytest.mark.parametrize("show", [str, repr, "{}".format, "{!s:>60}".format, "{!r}".format])
    def test_shown_like_a_native_one(self, method: Method, member: PeftType, show: Callable[[PeftType], str]) -> None:
        assert show(member).strip() == show(NATIVE).strip().replace("LORA", method.peft_type)

    def test_taken_apart_as_peft_does_for_its_status(self, method: Method, member: PeftType) -> None:
        assert str(member).partition(".")[-1] == method.peft_type

    def test_json(self, method: Method, member: PeftType) -> None:
        assert json.loads(json.dumps({"type": member})) == {"type": method.peft_type}

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle_and_copies_give_the_same_object(self, member: PeftType, protocol: int) -> None:
        assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert copy.copy(member) is member
        assert copy.deepcopy([member])[0] is member

    def test_unknown_values_still_raise(self) -> None:
        with pytest.raises(ValueError, match="'ZOO_NOTHING' is not a valid PeftType"):
            PeftType("ZOO_NOTHING")
        with pytest.raises(KeyError, match="ZOO_NOTHING"):
            PeftType["ZOO_NOTHING"]
        with pytest.raises(AttributeError):
            PeftType.ZOO_NOTHING  # noqa: B018

    def test_it_cannot_be_rebound(self, method: Method) -> None:
        with pytest.raises(AttributeError):
            setattr(PeftType, method.peft_type, "something else")


class TestMappings:
    def test_peft_finds_everything_by_member_and_by_value(self, method: Method, member: PeftType) -> None:
        for key in (member, method.peft_type):
            assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is method.config_cls
            assert PEFT_TYPE_TO_TUNER_MAPPING[key] is method.tuner_cls
            prefix = "lora_" if issubclass(method.tuner_cls, LoraModel) else f"{method.peft_type.lower()}_"
            assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == prefix

    def test_methods_are_listed_by_name_in_order(self, method: Method) -> None:
        listed = peft_zoo.methods()
        assert listed[method.name] is method
        assert list(listed) == sorted(listed)
        listed.clear()
        assert method.name in peft_zoo.methods(), "a caller gets a copy"

    def test_its_configuration_is_in_the_package(self, method: Method) -> None:
        assert getattr(peft_zoo, method.config_cls.__name__) is method.config_cls
        assert method.config_cls.__name__ in peft_zoo.__all__

    def test_nobody_can_register_it_a_second_time(self, method: Method) -> None:
        with pytest.raises(KeyError, match=f"already PEFT method called '{method.peft_type.lower()}'"):
            register_peft_method(
                name=method.peft_type.lower(), config_cls=method.config_cls, model_cls=method.tuner_cls
            )
        assert PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] is method.config_cls


class TestOtherProcesses:
    @pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
    @pytest.mark.parametrize("start", ["spawn", "fork"])  # a spawned process has imported nothing of ours
    def test_configurations_and_members_travel(self, start: str) -> None:
        if start not in multiprocessing.get_all_start_methods():
            pytest.skip(f"this system cannot {start}")
        configs = [method.config_cls(base_model_name_or_path="base") for method in METHODS]
        with multiprocessing.get_context(start).Pool(1) as pool:
            there = pool.map(operator.attrgetter("peft_type", "base_model_name_or_path"), configs)
            back = pool.apply(copy.deepcopy, (configs,))
        assert there == [(method.peft_type, "base") for method in METHODS]
        assert all(first is PeftType(first.value) for first, _ in there)
        assert back == configs


class TestImports:
    def test_reloading_and_importing_anew(self, tmp_path: Path) -> None:
        code = """
import importlib, threading
import peft, peft_zoo
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as MAPPING

names, members = list(peft_zoo.methods()), list(peft.PeftType)
old = {name: method.config_cls for name, method in peft_zoo.methods().items()}
kept = {name: method.config_cls(revision="4") for name, method in peft_zoo.methods().items()}

for module in [m for n, m in sys.modules.items() if n.startswith("peft_zoo.adapters.") and "base" not in n]:
    importlib.reload(module)
importlib.reload(peft_zoo)
print(list(peft_zoo.methods()) == names, list(peft.PeftType) == members)
for name, method in peft_zoo.methods().items():
    print(method.config_cls is not old[name], MAPPING[method.peft_type] is method.config_cls)
    print(method.config_cls().peft_type is kept[name].peft_type, type(kept[name])(revision="8").revision)

for name in [n for n in sys.modules if n.split(".")[0] == "peft_zoo"]:
    del sys.modules[name]
import peft_zoo as anew
print(anew is not peft_zoo, list(anew.methods()) == names, list(peft.PeftType) == members)

for name in [n for n in sys.modules if n.split(".")[0] == "peft_zoo"]:
    del sys.modules[name]
errors = []
def load():
    try:
        import peft_zoo
        assert list(peft_zoo.methods()) == names
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=load) for _ in range(32)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(errors, list(peft.PeftType) == members)
"""
        lines = run(code, tmp_path)
        assert lines == ["True True", *["True True", "True 8"] * len(METHODS), "True True True", "[] True"]

    def test_it_changes_nothing_of_others_but_their_registries(self, tmp_path: Path) -> None:
        for method in METHODS:
            method.config_cls().save_pretrained(str(tmp_path / method.name))
        (tmp_path / "users_module.py").write_text(
            "from peft import LoraConfig, get_peft_model\nfrom peft.tuners.lora.layer import dispatch_default\n"
            "from peft.utils.integrations import dequantize_module_weight\n"
        )
        code = f"""
import sys, types
sys.path.insert(0, ".")
import torchvision, transformers, peft, users_module
from transformers import AutoModelForCausalLM, Trainer

OTHERS = ("peft", "transformers", "torchvision", "users_module")
REGISTRIES = {{"PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"}}
REGISTRIES |= {{"AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"}}

def attributes():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in OTHERS or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__.split(".")[0] in OTHERS and key != "PeftType":
                found |= {{(name, key, inner): item for inner, item in list(vars(value).items())}}
            if isinstance(value, (dict, list, set)) and key not in REGISTRIES and not key.startswith("__"):
                found[name, key, "content"] = len(value)
    return found

before = attributes()
import peft_zoo
after = attributes()
for place, value in before.items():
    same = after[place] == value if place[-1] == "content" else after.get(place) is value
    if not same and place[-1] not in ("__abstractmethods__", "_abc_impl"):
        print("changed", *place)
print(*(place for place in after if len(place) == 3 and place[:2] in before and place not in before))
for name in {[method.name for method in METHODS]!r}:
    print(type(peft.PeftConfig.from_pretrained(name)).__name__)
"""
        assert run(code, tmp_path, hide=False) == ["", *(method.config_cls.__name__ for method in METHODS)]


class TestForeignOwner:
    def test_one_warning_names_who_has_the_value_and_the_others_are_unaffected(self, tmp_path: Path) -> None:
        first, *others = METHODS
        code = """
import warnings
from dataclasses import dataclass
import peft
from peft import LoraConfig, LoraModel, PeftType
from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method

value = sys.argv[1]
member = str.__new__(PeftType, value)  # as a future peft would have it
member._name_ = member._value_ = value
member.__objclass__ = PeftType
type.__setattr__(PeftType, value, member)
PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
PeftType._member_names_.append(value)
getattr(PeftType, "_hashable_values_", []).append(value)

@dataclass
class NativeConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = member

class NativeModel(LoraModel):
    prefix = value.lower() + "_"

NativeConfig.__module__ = NativeModel.__module__ = "peft.tuners.native"
register_peft_method(name=value.lower(), config_cls=NativeConfig, model_cls=NativeModel)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_zoo
print([str(w.message) for w in caught if "peft-zoo" in str(w.message)])
print(sorted(peft_zoo.methods()))
print(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[value] is NativeConfig, NativeConfig(r=2).peft_type)
try:
    getattr(peft_zoo, sys.argv[2])()
except ValueError as error:
    print(error)
"""
        name = first.config_cls.__name__
        lines = run(code, tmp_path, first.peft_type, name)
        assert lines[0] == repr(
            [
                f"{first.peft_type} already belongs to peft.tuners.native.NativeConfig; peft-zoo leaves it alone and "
                f"does not register {name}. Uninstall one of the two to choose."
            ]
        )
        assert lines[1] == repr([method.name for method in others])
        assert lines[2] == f"True {PeftType(first.peft_type)}"
        sentence = (
            f"peft_type={first.peft_type} belongs to peft.tuners.native.NativeConfig, so {name} is not registered."
        )
        assert lines[3].startswith(sentence)


class TestRegister:
    @pytest.fixture(autouse=True)
    def nothing_remains(self) -> Iterator[None]:
        """Checks after each test that an invalid registration changed no registry."""
        before = (
            list(PeftType),
            dict(PEFT_TYPE_TO_CONFIG_MAPPING),
            dict(PEFT_TYPE_TO_PREFIX_MAPPING),
            peft_zoo.methods(),
        )
        yield
        after = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING), peft_zoo.methods()
        assert after == before

    @pytest.mark.parametrize(
        ("name", "prefix"),
        [("Loud", "zoo_loud_"), ("quiet", "quiet_"), ("quiet", "zoo_quiet"), ("a b", "zoo_a b_"), ("", "zoo__")],
    )
    def test_wrong_names_and_prefixes_are_refused(self, name: str, prefix: str) -> None:
        config_cls = type("Config", (peft.LoraConfig,), {"method_name": name})
        tuner_cls = type("Model", (peft.LoraModel,), {"prefix": prefix})
        costs = dict.fromkeys(("summary", "parameters", "memory", "flops", "paper"), "x")
        with pytest.raises(ValueError, match=r"method_name=|prefix="):
            registration.register(config_cls, **costs)(tuner_cls)

    def test_an_unregistered_configuration_says_so(self) -> None:
        config_cls = type("Config", (peft.PeftConfig,), {"method_name": "nobodys"})
        with pytest.raises(ValueError, match="peft_type=ZOO_NOBODYS belongs to no class, so Config is not registered"):
            registration.peft_type_of(config_cls)
