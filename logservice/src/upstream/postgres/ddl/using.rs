//! Finds in the text of a session what the catalog does not keep: how `ALTER TABLE … ALTER COLUMN … TYPE … USING …` makes
//! new values.
//!
//! The text is what the client sent: it may hold several statements, or call a function that contains the one that
//! matters. It is believed only when it holds exactly one `ALTER TABLE` and no other statement that could hide one.

/// The statement, as far as it makes new values.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Alter {
    /// Name of the table without its schema, unquoted.
    pub(crate) table: String,
    /// The columns to which it gives a type.
    pub(crate) new_types: Vec<NewType>,
}

/// A new type for a column, and the expression that makes its values where the statement has one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NewType {
    /// Name of the column, unquoted.
    pub(crate) column: String,
    /// After `USING`.
    pub(crate) using: Option<String>,
}

/// Statements that only open, close or shape a transaction: they can stand beside the one that matters.
const HARMLESS: [&str; 10] =
    ["begin", "start", "commit", "end", "savepoint", "release", "set", "reset", "show", "lock"];

/// The only `ALTER TABLE` of a text. `None`: the text does not tell for sure.
pub(crate) fn only_alter(text: &str) -> Option<Alter> {
    let tokens = tokens(text)?;
    let mut alter: Option<&[Token]> = None;
    for statement in tokens.split(|token| token.kind == Kind::Semicolon).filter(|s| !s.is_empty()) {
        let first = statement.first()?;
        if first.is("alter") && statement.get(1).is_some_and(|token| token.is("table")) {
            if alter.is_some() {
                return None;
            }
            alter = Some(statement);
        } else if !HARMLESS.iter().any(|word| first.is(word)) {
            return None;
        }
    }
    let statement = alter?;
    // ALTER TABLE [IF EXISTS] [ONLY] name [*] action, …
    let rest = statement.get(2..)?;
    let rest = if rest.first()?.is("if") { rest.get(2..)? } else { rest };
    let rest = if rest.first()?.is("only") { rest.get(1..)? } else { rest };
    let mut table = rest.first()?.name()?;
    let mut rest = rest.get(1..)?;
    while rest.first().is_some_and(|token| token.kind == Kind::Dot) {
        table = rest.get(1)?.name()?;
        rest = rest.get(2..)?;
    }
    let actions = rest.split(|token| token.kind == Kind::Comma && token.depth == 0);
    Some(Alter { table, new_types: actions.filter_map(|action| new_type(text, action)).collect() })
}

/// Reads `[…] ALTER [COLUMN] name [SET DATA] TYPE … [USING …]`.
fn new_type(text: &str, action: &[Token]) -> Option<NewType> {
    let top = |token: &&Token| token.depth == 0;
    let at = action.iter().position(|token| token.depth == 0 && token.is("alter"))?;
    let mut rest = action[at + 1..].iter().filter(top).peekable();
    rest.next_if(|token| token.is("column"));
    let column = rest.next()?.name()?;
    if rest.next_if(|token| token.is("set")).is_some() {
        rest.next_if(|token| token.is("data"))?;
    }
    rest.next_if(|token| token.is("type"))?;
    let using = action.iter().position(|token| token.depth == 0 && token.is("using"));
    let using = using.and_then(|at| {
        let (first, last) = (action.get(at + 1)?, action.last()?);
        text.get(first.start..last.end).map(|expression| expression.trim().to_owned())
    });
    Some(NewType { column, using })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Word,
    Quoted,
    Comma,
    Semicolon,
    Dot,
    Other,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Token {
    kind: Kind,
    text: String,
    start: usize,
    end: usize,
    /// Open parentheses and brackets around it.
    depth: u32,
}

impl Token {
    fn is(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text == word
    }

    fn name(&self) -> Option<String> {
        match self.kind {
            Kind::Word | Kind::Quoted => Some(self.text.clone()),
            Kind::Comma | Kind::Semicolon | Kind::Dot | Kind::Other => None,
        }
    }
}

/// The words and signs of a text without its comments. `None` when something in it is not closed.
fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut out = Vec::new();
    let (mut at, mut depth) = (0, 0_u32);
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let (kind, len) = if c.is_whitespace() {
            at += c.len_utf8();
            continue;
        } else if rest.starts_with("--") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        } else if rest.starts_with("/*") {
            at += comment(rest)?;
            continue;
        } else if c == '"' {
            (Kind::Quoted, quoted(rest, '"', false)?)
        } else if c == '\'' {
            (Kind::Other, quoted(rest, '\'', false)?)
        } else if matches!(c, 'e' | 'E') && rest[1..].starts_with('\'') {
            (Kind::Other, 1 + quoted(&rest[1..], '\'', true)?)
        } else if let Some(len) = dollar_quoted(rest) {
            (Kind::Other, len?)
        } else if c.is_alphabetic() || c == '_' {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '$')));
            (Kind::Word, end.unwrap_or(rest.len()))
        } else {
            let kind = match c {
                ',' => Kind::Comma,
                ';' => Kind::Semicolon,
                '.' => Kind::Dot,
                _ => Kind::Other,
            };
            (kind, c.len_utf8())
        };
        if matches!(c, ')' | ']') && kind == Kind::Other {
            depth = depth.checked_sub(1)?;
        }
        let raw = &rest[..len];
        let word = match kind {
            Kind::Word => raw.to_ascii_lowercase(),
            Kind::Quoted => raw[1..len - 1].replace("\"\"", "\""),
            Kind::Comma | Kind::Semicolon | Kind::Dot | Kind::Other => String::new(),
        };
        out.push(Token { kind, text: word, start: at, end: at + len, depth });
        if matches!(c, '(' | '[') {
            depth += 1;
        }
        at += len;
    }
    (depth == 0).then_some(out)
}

/// Length of what is in quotes; the quote itself is doubled in it, or escaped.
fn quoted(text: &str, quote: char, escapes: bool) -> Option<usize> {
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if escapes && c == '\\' {
            chars.next()?;
        } else if c == quote && chars.next_if(|(_, next)| *next == quote).is_none() {
            return Some(at + 1);
        }
    }
    None
}

/// Length of a comment; they nest.
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0_u32, 0);
    loop {
        let rest = text.get(at..)?;
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += rest.chars().next()?.len_utf8();
        }
    }
}

/// Length of a dollar-quoted text; the outer `None` when there is none, the inner when it is not closed.
fn dollar_quoted(text: &str) -> Option<Option<usize>> {
    let inner = text.strip_prefix('$')?;
    let end = inner.find('$')?;
    let tag = &inner[..end];
    let is_tag = tag.chars().all(|c| c.is_alphanumeric() || c == '_')
        && !tag.starts_with(|c: char| c.is_ascii_digit());
    is_tag.then(|| {
        let open = &text[..end + 2];
        text[open.len()..].find(open).map(|at| at + 2 * open.len())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(text: &str) -> Option<Vec<(String, Option<String>)>> {
        let alter = only_alter(text)?;
        assert_eq!(alter.table.to_lowercase(), "t", "{text}");
        Some(alter.new_types.into_iter().map(|new| (new.column, new.using)).collect())
    }

    fn one(column: &str, using: Option<&str>) -> Option<Vec<(String, Option<String>)>> {
        Some(vec![(column.to_owned(), using.map(ToOwned::to_owned))])
    }

    #[test]
    fn the_expression_of_a_new_type_is_found() {
        assert_eq!(found("alter table app.t alter column n type bigint using n*2;"), one("n", Some("n*2")));
        assert_eq!(found("ALTER TABLE t ALTER n SET DATA TYPE numeric(10, 2)"), one("n", None));
        assert_eq!(
            found(
                "BEGIN; ALTER TABLE \"T\" -- not; this\n ALTER \"N \"\"x\" TYPE int USING (f(n, ', using '))::int; COMMIT"
            ),
            one("N \"x", Some("(f(n, ', using '))::int"))
        );
        assert_eq!(
            found(
                "alter table t add column x int, alter a type int using length(a), drop column y, alter b type text"
            ),
            Some(vec![("a".to_owned(), Some("length(a)".to_owned())), ("b".to_owned(), None)])
        );
        assert_eq!(
            found("/* a /* b */ ; */ alter table t alter a type int using $q$;$q$::int"),
            one("a", Some("$q$;$q$::int"))
        );
        assert_eq!(
            found("alter table t alter a type int using e'\\';'::int"),
            one("a", Some("e'\\';'::int"))
        );
    }

    #[test]
    fn a_text_that_may_hide_the_statement_tells_nothing() {
        for text in [
            "select f()",
            "do $$ begin alter table t alter a type int using 1; end $$",
            "alter table t alter a type int; alter table u alter a type int",
            "call p(); alter table t alter a type int",
            "alter table t alter a type int using 'open",
            "alter table t alter a type int using (1",
            "",
        ] {
            assert_eq!(found(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z ;'\"$(),/*\\\\\\-é]{0,60}") {
            drop(only_alter(&text));
        }
    }
}
