#include "cluster/text/jinja/parser.h"

#include <array>
#include <initializer_list>
#include <utility>

#include "cluster/text/jinja/expression_parser.h"
#include "cluster/text/jinja/lexer.h"

namespace spindle::text::jinja {
namespace {

// Statements; expressions come from the base class.
class Parser : public ExpressionParser {
 public:
  using ExpressionParser::ExpressionParser;

  Body parse_template() {
    Body body = parse_body({});
    if (current().kind != TokenKind::kEnd) fail("unexpected end tag '" + current().text + "'");
    return body;
  }

 private:
  // Statements up to the "{%" of an end tag, of which the name is then the current token; or, with
  // no end tags given, up to the end of the template.
  Body parse_body(std::initializer_list<std::string_view> end_tags) {
    Body body;
    if (++statement_depth_ > kMaxStatementDepth) fail("statements are nested too deeply");
    while (!failed() && current().kind != TokenKind::kEnd) {
      const Position position = current().position;
      if (current().kind == TokenKind::kData) {
        body.push_back({position, Data{current().text}});
        advance();
      } else if (current().kind == TokenKind::kVariableBegin) {
        advance();
        body.push_back({position, Print{parse_tuple(true)}});
        expect_kind(TokenKind::kVariableEnd, "'}}'");
      } else {
        expect_kind(TokenKind::kBlockBegin, "a tag");
        bool at_end_tag = false;
        for (const std::string_view tag : end_tags) at_end_tag |= current().is_name(tag);
        if (at_end_tag) break;
        parse_statement(position, body);
      }
    }
    if (end_tags.size() > 0 && current().kind == TokenKind::kEnd) {
      fail("the template ends before '" + std::string(*(end_tags.end() - 1)) + "'");
    }
    --statement_depth_;
    return body;
  }

  void end_tag() { expect_kind(TokenKind::kBlockEnd, "'%}'"); }

  // The body of a tag that `end` closes.
  Body parse_block(std::string_view end) {
    skip_operator(":");
    end_tag();
    Body body = parse_body({end});
    advance();
    end_tag();
    return body;
  }

  void parse_statement(Position position, Body& body) {
    using Method = void (Parser::*)(Position, Body&);
    constexpr std::array<std::pair<std::string_view, Method>, 11> kTags = {{
        {"if", &Parser::parse_if},
        {"for", &Parser::parse_for},
        {"set", &Parser::parse_set},
        {"macro", &Parser::parse_macro},
        {"call", &Parser::parse_call_block},
        {"filter", &Parser::parse_filter_block},
        {"with", &Parser::parse_with},
        {"generation", &Parser::parse_generation},
        {"break", &Parser::parse_break},
        {"continue", &Parser::parse_continue},
        {"print", &Parser::parse_print},
    }};
    for (const auto& [tag, method] : kTags) {
      if (!current().is_name(tag)) continue;
      advance();
      (this->*method)(position, body);
      return;
    }
    if (current().kind != TokenKind::kName) {
      fail("expected the name of a tag");
      return;
    }
    constexpr std::array<std::string_view, 7> kKnown = {"block", "extends",    "include", "import",
                                                        "from",  "autoescape", "do"};
    for (const std::string_view tag : kKnown) {
      if (current().is_name(tag)) {
        fail_unimplemented("the tag '" + current().text + "' is not supported");
      }
    }
    fail("unknown tag '" + current().text + "'");
  }

  void parse_if(Position position, Body& body) {
    If statement;
    do {
      ExpressionPtr condition = parse_tuple(false);
      skip_operator(":");
      end_tag();
      Body branch = parse_body({"elif", "else", "endif"});
      statement.branches.emplace_back(std::move(condition), std::move(branch));
    } while (skip_name("elif") && !failed());
    if (skip_name("else")) {
      statement.otherwise = parse_block("endif");
    } else {
      advance();
      end_tag();
    }
    body.push_back({position, std::move(statement)});
  }

  void parse_for(Position position, Body& body) {
    For statement;
    statement.target = parse_targets(false);
    if (statement.target.name == "loop") fail("cannot assign to 'loop' in a for statement");
    if (!skip_name("in")) fail("expected 'in'");
    statement.iterable = parse_tuple(false);
    if (skip_name("if")) statement.filter = parse_expression();
    if (current().is_name("recursive")) {
      fail_unimplemented("recursive loops are not supported");
    }
    skip_operator(":");
    end_tag();
    ++loop_depth_;
    statement.body = parse_body({"else", "endfor"});
    --loop_depth_;
    if (skip_name("else")) {
      statement.otherwise = parse_block("endfor");
    } else {
      advance();
      end_tag();
    }
    body.push_back({position, std::move(statement)});
  }

  void parse_set(Position position, Body& body) {
    Target target = parse_targets(true);
    if (skip_operator("=")) {
      ExpressionPtr value = parse_tuple(true);
      end_tag();
      body.push_back({position, Set{std::move(target), std::move(value)}});
      return;
    }
    ExpressionPtr filter = current().is_operator("|") ? parse_filters(nullptr) : nullptr;
    Body block = parse_block("endset");
    body.push_back({position, SetBlock{std::move(target), std::move(filter), std::move(block)}});
  }

  // "a", "a, b", "(a, b)"; with_namespace also allows "a.b".
  Target parse_targets(bool with_namespace) {
    Target target;
    target.position = current().position;
    const bool has_parentheses = skip_operator("(");
    bool is_tuple = false;
    while (!failed()) {
      Target part;
      part.position = current().position;
      part.name = expect_name();
      if (with_namespace && skip_operator(".")) part.attribute = expect_name();
      check_assignable(part);
      target.parts.push_back(std::move(part));
      if (!skip_operator(",")) break;
      is_tuple = true;
      if (current().kind != TokenKind::kName || current().is_name("in")) break;
    }
    if (has_parentheses) expect_operator(")");
    if (is_tuple || target.parts.empty()) return target;
    Target only = std::move(target.parts.front());
    return only;
  }

  void check_assignable(const Target& target) {
    constexpr std::array<std::string_view, 6> kConstants = {"true", "false", "none",
                                                            "True", "False", "None"};
    for (const std::string_view constant : kConstants) {
      if (target.name == constant) fail("cannot assign to '" + target.name + "'");
    }
  }

  std::vector<Parameter> parse_parameters() {
    std::vector<Parameter> parameters;
    expect_operator("(");
    while (!failed() && !current().is_operator(")")) {
      Parameter parameter;
      parameter.name = expect_name();
      if (skip_operator("=")) {
        parameter.if_absent = parse_expression();
      } else if (!parameters.empty() && parameters.back().if_absent != nullptr) {
        fail("a parameter without a default follows one with a default");
      }
      parameters.push_back(std::move(parameter));
      if (!skip_operator(",")) break;
    }
    expect_operator(")");
    return parameters;
  }

  // break and continue do not reach out of a macro.
  Body parse_macro_body(std::string_view end) {
    const int outer = std::exchange(loop_depth_, 0);
    Body body = parse_block(end);
    loop_depth_ = outer;
    return body;
  }

  void parse_macro(Position position, Body& body) {
    Macro macro;
    macro.name = expect_name();
    macro.parameters = parse_parameters();
    macro.body = parse_macro_body("endmacro");
    body.push_back({position, std::move(macro)});
  }

  void parse_call_block(Position position, Body& body) {
    auto caller = std::make_unique<Macro>();
    caller->name = "caller";
    if (current().is_operator("(")) caller->parameters = parse_parameters();
    ExpressionPtr call = parse_expression();
    if (!std::holds_alternative<Call>(call->node)) fail("expected a call");
    caller->body = parse_macro_body("endcall");
    body.push_back({position, CallBlock{std::move(call), std::move(caller)}});
  }

  void parse_filter_block(Position position, Body& body) {
    ExpressionPtr filter = parse_filter_chain_without_pipe();
    Body block = parse_block("endfilter");
    body.push_back({position, FilterBlock{std::move(filter), std::move(block)}});
  }

  void parse_with(Position position, Body& body) {
    With statement;
    while (!failed() && current().kind != TokenKind::kBlockEnd) {
      Target target;
      target.position = current().position;
      target.name = expect_name();
      expect_operator("=");
      statement.assignments.emplace_back(std::move(target), parse_expression());
      if (!skip_operator(",")) break;
    }
    statement.body = parse_block("endwith");
    body.push_back({position, std::move(statement)});
  }

  void parse_generation(Position position, Body& body) {
    body.push_back({position, Generation{parse_macro_body("endgeneration")}});
  }

  void parse_break(Position position, Body& body) {
    if (loop_depth_ == 0) fail("'break' outside of a loop");
    end_tag();
    body.push_back({position, Break{}});
  }

  void parse_continue(Position position, Body& body) {
    if (loop_depth_ == 0) fail("'continue' outside of a loop");
    end_tag();
    body.push_back({position, Continue{}});
  }

  void parse_print(Position position, Body& body) {
    do {
      body.push_back({position, Print{parse_expression()}});
    } while (skip_operator(",") && !failed());
    end_tag();
  }

  std::uint32_t statement_depth_ = 0;
  int loop_depth_ = 0;
};

}  // namespace

Result<Body> parse(std::string_view source) {
  auto tokens = tokenize(source);
  if (!tokens.ok()) return tokens.status();
  Parser parser(source, *std::move(tokens));
  Body body = parser.parse_template();
  if (!parser.status().ok()) return parser.status();
  return body;
}

}  // namespace spindle::text::jinja
