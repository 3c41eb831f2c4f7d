//! Which tables a changefeed wants: ordered `schema.table` patterns, the last that matches decides.

use std::fmt;

use crate::Error;

/// Compiled filter rules.
///
/// A rule is `schema.table`, with `!` in front to exclude. In either part `*` stands for any text, `?` for one
/// character, `[a-z]`, `[!a-z]` or `[^a-z]` for one character of (outside) a class, and `\` takes the next
/// punctuation character as it is. A part in double quotes or backquotes is taken literally, the quote itself
/// doubled. A table that no rule matches is not wanted. Empty rules and those that begin with `#` are skipped.
#[derive(Clone)]
pub struct TableFilter {
    rules: Vec<Rule>,
    case_sensitive: bool,
}

impl fmt::Debug for TableFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.rules.iter().map(|rule| rule.text.as_str())).finish()
    }
}

#[derive(Clone)]
struct Rule {
    text: String,
    include: bool,
    schema: Pattern,
    table: Pattern,
}

type Pattern = Vec<Token>;

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    Char(char),
    Any,
    One,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl TableFilter {
    /// Compiles rules.
    ///
    /// # Errors
    /// Names the first rule that is malformed.
    pub fn new<S: AsRef<str>>(rules: &[S], case_sensitive: bool) -> Result<Self, Error> {
        let mut compiled = Vec::with_capacity(rules.len());
        for text in rules {
            let text = text.as_ref().trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let rule = parse_rule(text, case_sensitive)
                .map_err(|reason| Error::FilterRule { rule: text.to_owned(), reason })?;
            compiled.push(rule);
        }
        Ok(Self { rules: compiled, case_sensitive })
    }

    /// Whether upper and lower case differ.
    #[must_use]
    pub fn is_case_sensitive(&self) -> bool {
        self.case_sensitive
    }

    /// Whether a table is wanted.
    #[must_use]
    pub fn matches(&self, schema: &str, table: &str) -> bool {
        let (schema, table) = (self.fold(schema), self.fold(table));
        self.rules
            .iter()
            .rev()
            .find(|rule| matches(&rule.schema, &schema) && matches(&rule.table, &table))
            .is_some_and(|rule| rule.include)
    }

    /// Whether some table of a schema may be wanted; for schema-level changes.
    #[must_use]
    pub fn matches_schema(&self, schema: &str) -> bool {
        let schema = self.fold(schema);
        for rule in self.rules.iter().rev().filter(|rule| matches(&rule.schema, &schema)) {
            if rule.include {
                return true;
            }
            if rule.table == [Token::Any] {
                return false;
            }
        }
        false
    }

    /// The rules as regular expressions of PostgreSQL, in order: `{"i": include, "s": schema, "t": table}`.
    pub(crate) fn to_patterns(&self) -> serde_json::Value {
        let pattern = |pattern: &Pattern| {
            let mut text = String::from(if self.case_sensitive { "^" } else { "(?i)^" });
            pattern.iter().for_each(|token| put_pattern(token, &mut text));
            text.push('$');
            text
        };
        let rules = self.rules.iter().map(|rule| {
            serde_json::json!({ "i": rule.include, "s": pattern(&rule.schema), "t": pattern(&rule.table) })
        });
        serde_json::Value::Array(rules.collect())
    }

    fn fold(&self, name: &str) -> Vec<char> {
        name.chars().map(|c| fold(c, self.case_sensitive)).collect()
    }
}

fn put_pattern(token: &Token, out: &mut String) {
    let put = |c: char, out: &mut String| {
        if c.is_ascii() && !c.is_ascii_alphanumeric() {
            out.push('\\');
        }
        out.push(c);
    };
    match token {
        Token::Char(c) => put(*c, out),
        Token::Any => out.push_str(".*"),
        Token::One => out.push('.'),
        Token::Class { negated, ranges } => {
            out.push_str(if *negated { "[^" } else { "[" });
            for (low, high) in ranges {
                put(*low, out);
                if low != high {
                    out.push('-');
                    put(*high, out);
                }
            }
            out.push(']');
        }
    }
}

fn fold(c: char, case_sensitive: bool) -> char {
    if case_sensitive {
        return c;
    }
    let mut lower = c.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(single), None) => single,
        _ => c,
    }
}

fn parse_rule(text: &str, case_sensitive: bool) -> Result<Rule, &'static str> {
    let (include, rest) = match text.strip_prefix('!') {
        Some(rest) => (false, rest.trim_start()),
        None => (true, text),
    };
    let mut chars = rest.chars().collect::<Vec<_>>().into_iter().peekable();
    let schema = parse_part(&mut chars, case_sensitive)?;
    if chars.next() != Some('.') {
        return Err("it must have the form schema.table");
    }
    let table = parse_part(&mut chars, case_sensitive)?;
    if chars.next().is_some() {
        return Err("something follows the table name; quote a name that contains a dot");
    }
    Ok(Rule { text: text.to_owned(), include, schema, table })
}

type Chars = std::iter::Peekable<std::vec::IntoIter<char>>;

fn parse_part(chars: &mut Chars, case_sensitive: bool) -> Result<Pattern, &'static str> {
    let tokens = match chars.peek() {
        Some(&quote @ ('"' | '`')) => {
            chars.next();
            parse_quoted(chars, quote, case_sensitive)?
        }
        _ => parse_wildcards(chars, case_sensitive)?,
    };
    if tokens.is_empty() { Err("a schema or table name is empty") } else { Ok(tokens) }
}

fn parse_quoted(chars: &mut Chars, quote: char, case_sensitive: bool) -> Result<Pattern, &'static str> {
    let mut tokens = Vec::new();
    while let Some(c) = chars.next() {
        if c == quote && chars.next_if_eq(&quote).is_none() {
            return Ok(tokens);
        }
        tokens.push(Token::Char(fold(c, case_sensitive)));
    }
    Err("a quote is not closed")
}

fn parse_wildcards(chars: &mut Chars, case_sensitive: bool) -> Result<Pattern, &'static str> {
    let mut tokens = Vec::new();
    while let Some(&c) = chars.peek() {
        if c == '.' {
            break;
        }
        chars.next();
        tokens.push(match c {
            '*' => {
                if tokens.last() == Some(&Token::Any) {
                    continue;
                }
                Token::Any
            }
            '?' => Token::One,
            '[' => parse_class(chars, case_sensitive)?,
            '\\' => Token::Char(fold(escaped(chars)?, case_sensitive)),
            '/' => return Err("regular expressions are not supported; use * ? [a-z]"),
            '"' | '`' | ']' | '!' | '@' | ',' | ';' => {
                return Err("a special character inside a name must be quoted or escaped with \\");
            }
            c if c.is_whitespace() => return Err("a name with a space must be quoted"),
            c => Token::Char(fold(c, case_sensitive)),
        });
    }
    Ok(tokens)
}

fn escaped(chars: &mut Chars) -> Result<char, &'static str> {
    match chars.next() {
        Some(c) if c.is_ascii_alphanumeric() => Err("\\ may only stand before punctuation"),
        Some(c) => Ok(c),
        None => Err("it ends with \\"),
    }
}

fn parse_class(chars: &mut Chars, case_sensitive: bool) -> Result<Token, &'static str> {
    const OPEN: &str = "a class [ is not closed";
    let negated = chars.next_if(|c| matches!(c, '!' | '^')).is_some();
    let mut ranges = Vec::new();
    loop {
        let low = match chars.next().ok_or(OPEN)? {
            ']' if !ranges.is_empty() => return Ok(Token::Class { negated, ranges }),
            ']' => return Err("a class [] is empty"),
            '\\' => escaped(chars)?,
            c => c,
        };
        let mut high = low;
        if chars.peek() == Some(&'-') {
            chars.next();
            match chars.next().ok_or(OPEN)? {
                ']' => {
                    ranges.extend([(low, low), ('-', '-')]);
                    return Ok(Token::Class { negated, ranges });
                }
                '\\' => high = escaped(chars)?,
                c => high = c,
            }
        }
        if low > high {
            return Err("a class has a range that goes backwards");
        }
        ranges.push((low, high));
        if !case_sensitive {
            // Names are folded to lower case, so a range of letters also stands for its other case.
            ranges.push((low.to_ascii_lowercase(), high.to_ascii_lowercase()));
        }
    }
}

/// Glob matching with one point of return: linear in practice, quadratic at worst.
fn matches(pattern: &[Token], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while t < text.len() {
        let step = match pattern.get(p) {
            Some(Token::Any) => {
                back = Some((p, t));
                p += 1;
                continue;
            }
            Some(Token::One) => true,
            Some(Token::Char(c)) => *c == text[t],
            Some(Token::Class { negated, ranges }) => {
                ranges.iter().any(|&(low, high)| (low..=high).contains(&text[t])) != *negated
            }
            None => false,
        };
        if step {
            p += 1;
            t += 1;
        } else if let Some((star, at)) = back {
            p = star + 1;
            t = at + 1;
            back = Some((star, at + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|token| *token == Token::Any)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(rules: &[&str], schema: &str, table: &str) -> bool {
        TableFilter::new(rules, true).expect("rules").matches(schema, table)
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let rules = ["shop.*", "!shop.tmp_*", "shop.tmp_keep"];
        assert!(wanted(&rules, "shop", "orders"));
        assert!(!wanted(&rules, "shop", "tmp_1"));
        assert!(wanted(&rules, "shop", "tmp_keep"));
        assert!(!wanted(&rules, "other", "orders"));
        assert!(!wanted(&[], "shop", "orders"));
        assert!(!wanted(&["!shop.x"], "shop", "orders"));
    }

    #[test]
    fn wildcards_classes_quotes_and_escapes() {
        for (rule, schema, table, expected) in [
            ("*.*", "a", "b", true),
            ("sh?p.o*s", "shop", "orders", true),
            ("sh?p.o*s", "shp", "orders", false),
            ("shop.*_*_z", "shop", "a_b_c_z", true),
            ("shop.t[0-9][!a-c]", "shop", "t1d", true),
            ("shop.t[0-9][!a-c]", "shop", "t1b", false),
            ("shop.t[^0-9]", "shop", "t5", false),
            ("shop.t[a-]", "shop", "t-", true),
            (r"shop.t[\]a]", "shop", "t]", true),
            (r#""my shop"."a.b*""#, "my shop", "a.b*", true),
            (r#""my shop"."a.b*""#, "my shop", "a.bc", false),
            (r#"shop."say ""hi""""#, "shop", r#"say "hi""#, true),
            ("`shop`.`a``b`", "shop", "a`b", true),
            (r"shop.a\*", "shop", "a*", true),
            (r"shop.a\*", "shop", "ab", false),
            (r"shop.a\.b", "shop", "a.b", true),
            ("Größe.*", "Größe", "x", true),
            ("shop.日?語", "shop", "日本語", true),
        ] {
            assert_eq!(wanted(&[rule], schema, table), expected, "{rule} on {schema}.{table}");
        }
    }

    #[test]
    fn case_counts_only_when_asked() {
        assert!(!wanted(&["Shop.ORDERS"], "shop", "orders"));
        let filter = TableFilter::new(&["Shop.ORD[A-F]RS", "!x.\"Ä\""], false).expect("rules");
        assert!(filter.matches("sHOP", "orders"));
        assert!(!filter.matches("x", "ä"));
    }

    #[test]
    fn malformed_rules_are_refused_by_name() {
        for rule in [
            "shop", "shop.", ".t", "a.b.c", "\"a.b", "a.[", "a.[]", "a.[z-a]", "a.b\\", "a.\\n", "/x/.y",
            "a.b c",
        ] {
            let error = TableFilter::new(&["*.*", rule], true).expect_err(rule);
            assert_eq!(error.code(), "CDC:ErrFilterRuleInvalid", "{rule}");
            assert!(error.to_string().contains(&format!("{rule:?}")), "{error}");
        }
        assert!(TableFilter::new(&["", "# comment", "a.*"], true).expect("skipped").matches("a", "b"));
    }

    #[test]
    fn rules_are_told_as_regular_expressions() {
        let filter = TableFilter::new(&["a.t?[0-9_]", "!\"x.y\".b*"], true).expect("rules");
        assert_eq!(
            filter.to_patterns().to_string(),
            r#"[{"i":true,"s":"^a$","t":"^t.[0-9\\_]$"},{"i":false,"s":"^x\\.y$","t":"^b.*$"}]"#
        );
        let folded = TableFilter::new(&["A.*"], false).expect("rules").to_patterns();
        assert_eq!(folded[0]["s"], "(?i)^a$");
    }

    #[test]
    fn a_schema_is_wanted_while_one_of_its_tables_may_be() {
        let filter = TableFilter::new(&["*.*", "!a.*", "!b.x"], true).expect("rules");
        assert!(!filter.matches_schema("a"));
        assert!(filter.matches_schema("b"));
        assert!(filter.matches_schema("c"));
    }
}
