#include "cluster/text/jinja/interpreter.h"

#include <utility>
#include <vector>

#include "cluster/text/jinja/access.h"
#include "cluster/text/jinja/callable.h"
#include "cluster/text/jinja/filters.h"
#include "cluster/text/jinja/json_form.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/text_form.h"

namespace spindle::text::jinja {

// Variables of one block. Names are looked up from the innermost scope outwards and always set in
// the innermost one.
struct Scope {
  Scope* parent;
  std::pmr::vector<std::pair<std::string_view, Value>> variables;
};

namespace {

enum class Flow { kNormal, kBreak, kContinue };

class Interpreter {
 public:
  explicit Interpreter(Runtime& runtime) : runtime_(runtime), scope_(new_scope(nullptr)) {}

  void define_context(const boost::json::object& context, const boost::json::object& defaults) {
    define(context, nullptr);
    define(defaults, &context);
    scope_ = new_scope(scope_);  // so that the template's own variables are found first
  }

  std::string run(const Body& body) {
    std::string output;
    output_ = &output;
    execute(body);
    return output;
  }

 private:
  // ---- scopes and output ----

  void define(const boost::json::object& variables, const boost::json::object* except) {
    for (const auto& [name, value] : variables) {
      if (runtime_.failed()) return;
      if (except != nullptr && except->contains(name)) continue;
      runtime_.reserve_memory(3 * sizeof(Value));
      scope_->variables.emplace_back(std::string_view(name.data(), name.size()),
                                     from_json(runtime_, value));
    }
  }

  Scope* new_scope(Scope* parent) {
    return runtime_.make<Scope>(
        Scope{parent, std::pmr::vector<std::pair<std::string_view, Value>>(runtime_.memory())});
  }

  Value* find_variable(std::string_view name) {
    for (Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
      if (!runtime_.step(1 + scope->variables.size() / 16)) return nullptr;
      for (auto& [known, value] : scope->variables) {
        if (known == name) return &value;
      }
    }
    return nullptr;
  }

  void set_variable(std::string_view name, const Value& value) {
    if (!runtime_.step(1 + scope_->variables.size() / 16)) return;
    for (auto& [known, known_value] : scope_->variables) {
      if (known == name) {
        known_value = value;
        return;
      }
    }
    if (runtime_.reserve_memory(5 * sizeof(Value))) scope_->variables.emplace_back(name, value);
  }

  void write(std::string_view text) {
    if (runtime_.check_output(output_->size() + text.size()) && runtime_.step_over(text)) {
      output_->append(text);
    }
  }

  // Runs `body` in a scope of its own and gives what it wrote.
  Value capture(const Body& body, Scope* scope) {
    std::string captured;
    std::string* const outer_output = std::exchange(output_, &captured);
    Scope* const outer_scope = std::exchange(scope_, scope);
    execute(body);
    output_ = outer_output;
    scope_ = outer_scope;
    return runtime_.string(captured);
  }

  // ---- statements ----

  Flow execute(const Body& body) {
    const DepthGuard guard(runtime_);
    if (!guard) return Flow::kNormal;
    for (const Statement& statement : body) {
      runtime_.set_position(statement.position);
      if (!runtime_.step()) break;
      const Flow flow =
          std::visit([this](const auto& node) { return execute_node(node); }, statement.node);
      if (flow != Flow::kNormal || runtime_.failed()) return flow;
    }
    return Flow::kNormal;
  }

  Flow execute_node(const Data& data) {
    write(data.text);
    return Flow::kNormal;
  }

  Flow execute_node(const Print& print) {
    write(to_text(runtime_, evaluate(*print.expression)));
    return Flow::kNormal;
  }

  Flow execute_node(const If& statement) {
    for (const auto& [condition, body] : statement.branches) {
      const bool holds = is_truthy(evaluate(*condition));
      if (runtime_.failed()) return Flow::kNormal;
      if (holds) return execute(body);
    }
    return execute(statement.otherwise);
  }

  Flow execute_node(const For& statement) {
    const List* items = iterate(runtime_, evaluate(*statement.iterable));
    if (items == nullptr || runtime_.failed()) return Flow::kNormal;
    Scope* const outer_scope = scope_;
    scope_ = new_scope(outer_scope);
    if (statement.filter != nullptr) items = filter_items(statement, *items);
    Loop* loop = runtime_.make<Loop>(Loop{.items = items});
    // As in Jinja, "else" runs if no iteration came to its end: also after a break in the first.
    bool completed_any = false;
    for (; loop->index0 < items->items.size(); ++loop->index0) {
      if (!runtime_.step()) break;
      scope_->variables.clear();
      set_variable("loop", loop);
      assign(statement.target, items->items[loop->index0]);
      const Flow flow = execute(statement.body);
      if (flow == Flow::kBreak || runtime_.failed()) break;
      completed_any = completed_any || flow == Flow::kNormal;
    }
    scope_ = outer_scope;
    if (!completed_any && !runtime_.failed()) return execute(statement.otherwise);
    return Flow::kNormal;
  }

  const List* filter_items(const For& statement, const List& items) {
    List* kept = runtime_.list(ListKind::kGenerator);
    for (const Value& item : items.items) {
      if (!runtime_.step()) break;
      assign(statement.target, item);
      if (is_truthy(evaluate(*statement.filter))) runtime_.push(*kept, item);
    }
    return kept;
  }

  Flow execute_node(const Set& statement) {
    assign(statement.target, evaluate(*statement.value));
    return Flow::kNormal;
  }

  Flow execute_node(const SetBlock& statement) {
    Value text = capture(statement.body, new_scope(scope_));
    if (statement.filter != nullptr) text = apply_filter_chain(*statement.filter, text);
    assign(statement.target, text);
    return Flow::kNormal;
  }

  Flow execute_node(const With& statement) {
    Scope* const inner = new_scope(scope_);
    std::vector<Value> values;
    for (const auto& [target, expression] : statement.assignments) {
      values.push_back(evaluate(*expression));
    }
    Scope* const outer = std::exchange(scope_, inner);
    for (std::size_t i = 0; i < values.size(); ++i) {
      assign(statement.assignments[i].first, values[i]);
    }
    const Flow flow = execute(statement.body);
    scope_ = outer;
    return flow;
  }

  Flow execute_node(const Macro& macro) {
    set_variable(macro.name, new_macro(macro));
    return Flow::kNormal;
  }

  Flow execute_node(const CallBlock& statement) {
    const auto& call = std::get<Call>(statement.call->node);
    const Value function = evaluate(*call.function);
    Arguments arguments = evaluate_arguments(call.arguments);
    arguments.keywords.emplace_back("caller", new_macro(*statement.caller));
    runtime_.set_position(statement.call->position);
    write(to_text(runtime_, call_value(function, arguments)));
    return Flow::kNormal;
  }

  Flow execute_node(const FilterBlock& statement) {
    const Value text = capture(statement.body, new_scope(scope_));
    write(to_text(runtime_, apply_filter_chain(*statement.filter, text)));
    return Flow::kNormal;
  }

  Flow execute_node(const Generation& statement) {
    Scope* const outer = std::exchange(scope_, new_scope(scope_));
    execute(statement.body);
    scope_ = outer;
    return Flow::kNormal;
  }

  Flow execute_node(const Break&) { return Flow::kBreak; }
  Flow execute_node(const Continue&) { return Flow::kContinue; }

  void assign(const Target& target, const Value& value) {
    if (runtime_.failed()) return;
    runtime_.set_position(target.position);
    if (!target.attribute.empty()) {
      assign_attribute(target, value);
    } else if (target.parts.empty()) {
      set_variable(target.name, value);
    } else {
      const List* items = iterate(runtime_, value);
      if (items == nullptr) return;
      if (items->items.size() != target.parts.size()) {
        runtime_.fail("cannot unpack " + std::to_string(items->items.size()) + " values into " +
                      std::to_string(target.parts.size()) + " names");
        return;
      }
      for (std::size_t i = 0; i < target.parts.size(); ++i) {
        assign(target.parts[i], items->items[i]);
      }
    }
  }

  void assign_attribute(const Target& target, const Value& value) {
    const Value* variable = find_variable(target.name);
    Namespace* const* space = variable == nullptr ? nullptr : variable->get_if<Namespace*>();
    if (space == nullptr) {
      runtime_.fail("cannot assign an attribute on '" + target.name +
                    "', which is not a namespace");
      return;
    }
    if (!runtime_.step(1 + (*space)->attributes.size() / 8)) return;
    if (Value* known = (*space)->find(target.attribute)) {
      *known = value;
    } else if (runtime_.reserve_memory(5 * sizeof(Value))) {
      (*space)->attributes.emplace_back(target.attribute, value);
    }
  }

  // ---- expressions ----

  Value evaluate(const Expression& expression) {
    const DepthGuard guard(runtime_);
    if (!guard || !runtime_.step()) return {};
    const Value value = std::visit(
        [this, &expression](const auto& node) { return evaluate_node(node, expression); },
        expression.node);
    return runtime_.failed() ? Value() : value;
  }

  // Errors after this name the expression, not the part of it that was evaluated last.
  void back_at(const Expression& expression) { runtime_.set_position(expression.position); }

  Value evaluate_node(const Constant& constant, const Expression&) {
    if (std::holds_alternative<std::monostate>(constant.value)) return None{};
    if (const auto* boolean = std::get_if<bool>(&constant.value)) return *boolean;
    if (const auto* integer = std::get_if<std::int64_t>(&constant.value)) return *integer;
    if (const auto* real = std::get_if<double>(&constant.value)) return *real;
    return std::string_view(std::get<std::string>(constant.value));
  }

  Value evaluate_node(const Name& name, const Expression&) {
    if (const Value* value = find_variable(name.name)) return *value;
    if (const auto function = find_global(name.name)) {
      return static_cast<const Callable*>(runtime_.make<Callable>(Callable{*function}));
    }
    return Undefined{name.name, {}};
  }

  Value evaluate_node(const ListLiteral& literal, const Expression&) {
    List* list = runtime_.list(literal.is_tuple ? ListKind::kTuple : ListKind::kList);
    for (const ExpressionPtr& item : literal.items) runtime_.push(*list, evaluate(*item));
    return static_cast<const List*>(list);
  }

  Value evaluate_node(const DictLiteral& literal, const Expression&) {
    Dict* dict = runtime_.dict();
    for (const auto& [key, value] : literal.entries) {
      const Value evaluated_key = evaluate(*key);
      const Value evaluated_value = evaluate(*value);
      runtime_.set(*dict, evaluated_key, evaluated_value);
    }
    return static_cast<const Dict*>(dict);
  }

  Value evaluate_node(const Unary& unary, const Expression& expression) {
    const Value operand = evaluate(*unary.operand);
    if (runtime_.failed()) return {};
    back_at(expression);
    if (unary.op == UnaryOperator::kNot) return !is_truthy(operand);
    return unary.op == UnaryOperator::kMinus ? apply_minus(runtime_, operand)
                                             : apply_plus(runtime_, operand);
  }

  Value evaluate_node(const Binary& binary, const Expression& expression) {
    const Value left = evaluate(*binary.left);
    if (runtime_.failed()) return {};
    if (binary.op == BinaryOperator::kAnd) {
      return is_truthy(left) ? evaluate(*binary.right) : left;
    }
    if (binary.op == BinaryOperator::kOr) return is_truthy(left) ? left : evaluate(*binary.right);
    const Value right = evaluate(*binary.right);
    if (runtime_.failed()) return {};
    back_at(expression);
    return apply_binary(runtime_, binary.op, left, right);
  }

  Value evaluate_node(const Concatenation& concatenation, const Expression&) {
    std::string joined;
    for (const ExpressionPtr& part : concatenation.parts) {
      joined += to_text(runtime_, evaluate(*part));
      if (runtime_.failed() || !runtime_.check_output(joined.size())) return {};
    }
    return runtime_.string(joined);
  }

  Value evaluate_node(const CompareChain& chain, const Expression& expression) {
    Value left = evaluate(*chain.first);
    for (const auto& [comparison, operand] : chain.rest) {
      const Value right = evaluate(*operand);
      if (runtime_.failed()) return {};
      back_at(expression);
      if (!apply_comparison(runtime_, comparison, left, right)) return false;
      left = right;
    }
    return true;
  }

  Value evaluate_node(const Conditional& conditional, const Expression&) {
    const bool holds = is_truthy(evaluate(*conditional.condition));
    if (holds) return evaluate(*conditional.if_true);
    return conditional.if_false == nullptr ? Value() : evaluate(*conditional.if_false);
  }

  Value evaluate_node(const Attribute& attribute, const Expression& expression) {
    const Value object = evaluate(*attribute.object);
    back_at(expression);
    return runtime_.failed() ? Value() : get_attribute(runtime_, object, attribute.name);
  }

  Value evaluate_node(const Subscript& subscript, const Expression& expression) {
    const Value object = evaluate(*subscript.object);
    const Value index = evaluate(*subscript.index);
    back_at(expression);
    return runtime_.failed() ? Value() : get_item(runtime_, object, index);
  }

  Value evaluate_node(const Slice& slice, const Expression& expression) {
    const auto bound = [this](const ExpressionPtr& part) {
      return part == nullptr ? Value(None{}) : evaluate(*part);
    };
    const Value object = evaluate(*slice.object);
    const Value begin = bound(slice.begin);
    const Value end = bound(slice.end);
    const Value step = bound(slice.step);
    back_at(expression);
    return runtime_.failed() ? Value() : get_slice(runtime_, object, begin, end, step);
  }

  Value evaluate_node(const Call& call, const Expression& expression) {
    const Value function = evaluate(*call.function);
    const Arguments arguments = evaluate_arguments(call.arguments);
    back_at(expression);
    return call_value(function, arguments);
  }

  Value evaluate_node(const FilterCall& filter, const Expression& expression) {
    const Value input = filter.input == nullptr ? block_text_ : evaluate(*filter.input);
    const Arguments arguments = evaluate_arguments(filter.arguments);
    back_at(expression);
    return runtime_.failed() ? Value() : apply_filter(runtime_, filter.name, input, arguments);
  }

  Value evaluate_node(const TestCall& test, const Expression& expression) {
    const Value input = evaluate(*test.input);
    const Arguments arguments = evaluate_arguments(test.arguments);
    back_at(expression);
    if (runtime_.failed()) return {};
    return apply_test(runtime_, test.name, input, arguments) != test.negated;
  }

  // ---- calls ----

  Arguments evaluate_arguments(const ArgumentList& list) {
    Arguments arguments;
    for (const ExpressionPtr& argument : list.positional) {
      arguments.positional.push_back(evaluate(*argument));
    }
    for (const auto& [name, argument] : list.keywords) {
      arguments.keywords.emplace_back(name, evaluate(*argument));
    }
    return arguments;
  }

  Value apply_filter_chain(const Expression& filter, const Value& text) {
    const Value outer = std::exchange(block_text_, text);
    const Value filtered = evaluate(filter);
    block_text_ = outer;
    return filtered;
  }

  Value new_macro(const Macro& macro) {
    return static_cast<const Callable*>(
        runtime_.make<Callable>(Callable{BoundMacro{&macro, scope_}}));
  }

  Value call_value(const Value& function, const Arguments& arguments) {
    if (runtime_.failed()) return {};
    const auto* callable = function.get_if<const Callable*>();
    if (callable == nullptr) {
      if (function.is_undefined()) return runtime_.fail_undefined(function);
      return runtime_.fail("'" + std::string(function.type_name()) + "' object is not callable");
    }
    const auto& target = (*callable)->target;
    if (const auto* method = std::get_if<BoundMethod>(&target)) {
      return method->function(runtime_, method->receiver, arguments);
    }
    if (const auto* macro = std::get_if<BoundMacro>(&target)) return call_macro(*macro, arguments);
    return std::get<GlobalFunction>(target)(runtime_, arguments);
  }

  Value call_macro(const BoundMacro& bound, const Arguments& arguments) {
    const Macro& macro = *bound.macro;
    Scope* const scope = new_scope(bound.closure);
    Scope* const outer = std::exchange(scope_, scope);
    bind_parameters(macro, arguments);
    scope_ = outer;
    if (runtime_.failed()) return {};
    return capture(macro.body, scope);
  }

  // Sets the parameters in the current scope.
  void bind_parameters(const Macro& macro, const Arguments& arguments) {
    if (arguments.positional.size() > macro.parameters.size()) {
      runtime_.fail("macro '" + macro.name + "' takes not more than " +
                    std::to_string(macro.parameters.size()) + " arguments");
      return;
    }
    for (std::size_t i = 0; i < macro.parameters.size(); ++i) {
      const Parameter& parameter = macro.parameters[i];
      if (i < arguments.positional.size()) {
        set_variable(parameter.name, arguments.positional[i]);
      } else if (parameter.if_absent != nullptr && !has_keyword(arguments, parameter.name)) {
        set_variable(parameter.name, evaluate(*parameter.if_absent));
      } else {
        set_variable(parameter.name, Undefined{parameter.name, {}});
      }
    }
    for (const auto& [name, value] : arguments.keywords) {
      bind_keyword(macro, arguments.positional.size(), name, value);
    }
  }

  static bool has_keyword(const Arguments& arguments, std::string_view wanted) {
    for (const auto& [name, value] : arguments.keywords) {
      if (name == wanted) return true;
    }
    return false;
  }

  void bind_keyword(const Macro& macro, std::size_t n_positional, std::string_view name,
                    const Value& value) {
    for (std::size_t i = 0; i < macro.parameters.size(); ++i) {
      if (macro.parameters[i].name != name) continue;
      if (i < n_positional) {
        runtime_.fail("macro '" + macro.name + "' got the argument '" + std::string(name) +
                      "' twice");
      }
      set_variable(name, value);
      return;
    }
    if (name != "caller") {
      runtime_.fail("macro '" + macro.name + "' has no parameter '" + std::string(name) + "'");
      return;
    }
    set_variable(name, value);
  }

  Runtime& runtime_;
  Scope* scope_;
  std::string* output_ = nullptr;
  Value block_text_;  // the input of a filter chain without one
};

}  // namespace

Result<std::string> render(const Body& body, const boost::json::object& context,
                           const boost::json::object& defaults, Runtime& runtime) {
  Interpreter interpreter(runtime);
  interpreter.define_context(context, defaults);
  std::string output = interpreter.run(body);
  if (runtime.failed()) return runtime.status();
  return output;
}

}  // namespace spindle::text::jinja
